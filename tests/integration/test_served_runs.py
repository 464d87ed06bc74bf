"""Whole runs that sample with a real vLLM or SGLang server, which is killed in the middle of one."""

import contextlib

import psutil
import pytest

from tests.integration.conftest import RUN

pytestmark = [pytest.mark.engines, pytest.mark.timeout(900)]

SERVED = (
    RUN.replace("{type: transformers, batch: 4}, replicas: 2", "{type: SERVER}, replicas: 1")
    .replace("beta: 0.01", "beta: 0.0")
    .replace("iterations: 6", "iterations: 12")
    .replace("learner: {replicas: 2", "learner: {replicas: 1")
)


def servers(since: float) -> list[psutil.Process]:
    """The engine servers that guards have started since then."""
    found = []
    for process in psutil.process_iter(["cmdline", "create_time"]):
        words = process.info["cmdline"] or []
        if any(word.endswith("engines/guard.py") for word in words) and process.info["create_time"] >= since:
            with contextlib.suppress(psutil.Error):
                found += process.children()
    return found


@pytest.mark.parametrize("server", ["sglang", "vllm"])
def test_a_killed_server_is_started_again_and_every_prompt_is_trained_once(make_run, server):
    run = make_run(server, SERVED.replace("SERVER", server), server)
    run.start()
    since = psutil.Process(run.process.pid).create_time()
    run.wait_for(lambda log: log.last_iteration >= 1)
    (killed,) = servers(since)
    run.kill(killed.pid)
    assert run.finish() == 0, run.text()
    assert "another one takes its place" in run.text()
    assert run.log.finished()["ledger"] == {"trained": 192}
    assert len(set(run.trained())) == len(run.trained()) == 192
    assert servers(since) == []
