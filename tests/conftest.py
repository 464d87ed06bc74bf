"""What every test shares: offline, one thread, the CPU; a small model built once."""

import os

os.environ.update(
    {
        "OMP_NUM_THREADS": "1",
        "DS_ACCELERATOR": os.environ.get("DS_ACCELERATOR", "cpu"),
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "RAY_USAGE_STATS_ENABLED": "0",
        "DO_NOT_TRACK": "1",
    }
)

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
WORKLOAD = ROOT / "workloads" / "r1_reward"


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The digits workload's tiny Qwen2.5-VL, random weights of seed 0, as a model folder."""
    sys.path.insert(0, str(WORKLOAD))
    import tiny_model as factory

    folder = tmp_path_factory.mktemp("model") / "tiny"
    factory.build(folder, 0)
    return folder
