"""Engine servers, each started once for all tests: minutes go into a start, milliseconds into a test."""

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from steadyhelm.engines.process import EngineProcess
from steadyhelm.services.rollout.served import ServerSpec
from steadyhelm.services.rollout.sglang import sglang_plan
from steadyhelm.services.rollout.vllm import vllm_plan

ROOT = Path(__file__).resolve().parents[2]


PLANS = {"vllm": vllm_plan, "sglang": sglang_plan}


@pytest.fixture(scope="session")
def vllm_server(tiny_model: Path) -> Iterator[EngineProcess]:
    """A vLLM server of the tiny model."""
    with served("vllm", tiny_model) as server:
        yield server


@pytest.fixture(scope="session")
def sglang_server(tiny_model: Path) -> Iterator[EngineProcess]:
    """An SGLang server of the tiny model."""
    with served("sglang", tiny_model) as server:
        yield server


@contextmanager
def served(engine: str, folder: Path, key: str = "") -> Iterator[EngineProcess]:
    """A server of a model folder, as a rollout actor would start it; with that key, or one of its own."""
    python = subprocess.run([ROOT / ".ci" / "engines", engine], capture_output=True, text=True)
    assert python.returncode == 0, python.stderr
    plan = PLANS[engine](
        ServerSpec(
            python=python.stdout.strip(),
            folder=str(folder),
            dtype="float32",
            device="cpu",
            max_tokens=1024,
            min_pixels=3136,
            max_pixels=100352,
            sees_images=True,
        )
    )
    server = EngineProcess.start(lambda port, own: plan(port, key or own), deadline_s=600.0, scratch_bytes=64 << 20)
    try:
        yield server
    finally:
        server.close()
