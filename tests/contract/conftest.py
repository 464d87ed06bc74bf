"""Engine servers, each started once for all tests: minutes go into a start, milliseconds into a test."""

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from steadyhelm.engines.process import EngineProcess
from steadyhelm.services.rollout.served import ServerSpec
from steadyhelm.services.rollout.vllm import vllm_plan

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="session")
def vllm_server(tiny_model: Path) -> Iterator[EngineProcess]:
    """A vLLM server of the tiny model."""
    python = subprocess.run([ROOT / ".ci" / "engines", "vllm"], capture_output=True, text=True)
    assert python.returncode == 0, python.stderr
    plan = vllm_plan(
        ServerSpec(
            python=python.stdout.strip(),
            folder=str(tiny_model),
            dtype="float32",
            device="cpu",
            max_tokens=1024,
            min_pixels=3136,
            max_pixels=100352,
            sees_images=True,
        )
    )
    server = EngineProcess.start(plan, deadline_s=600.0, scratch_bytes=64 << 20)
    yield server
    server.close()
