"""Whole runs on engine servers that somebody else runs, one of which is killed in the middle."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import psutil
import pytest
from steadyhelm.engines.process import EngineProcess

from tests.contract.conftest import served
from tests.integration.conftest import RUN, Run

pytestmark = [pytest.mark.engines, pytest.mark.timeout(900)]

KEY = "one-key-for-all-servers"
EXTERNAL = (
    RUN.replace("engine: {type: transformers, batch: 4}, replicas: 2", "engine: ENGINE, replicas: SERVERS")
    .replace("beta: 0.01", "beta: 0.0")
    .replace("learner: {replicas: 2", "learner: {replicas: 1")
)


@pytest.fixture
def servers(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[EngineProcess]]:
    """Two servers that no rollout actor started, which start side by side."""
    monkeypatch.setenv("ENGINE_KEY", KEY)
    with ExitStack() as running, ThreadPoolExecutor() as starts:
        started = [starts.submit(running.enter_context, served("sglang", tiny_model, KEY)) for _ in range(2)]
        yield [start.result() for start in started]


def external(used: list[EngineProcess], weights: Path) -> str:
    """The run file over these servers."""
    urls = ", ".join(f'"{server.url}"' for server in used)
    more = f"weights_folder: {weights}, key_variable: ENGINE_KEY, batch: 4"
    engine = f"{{type: external, server: sglang, urls: [{urls}], {more}}}"
    return EXTERNAL.replace("ENGINE", engine).replace("SERVERS", str(len(used)))


def test_a_killed_external_server_is_routed_around_and_without_another_the_run_ends_and_names_it(
    make_run, servers: list[EngineProcess], tmp_path: Path
) -> None:
    first, second = servers
    run: Run = make_run("two", external(servers, tmp_path), "external")
    run.start()
    run.wait_for(lambda log: log.last_iteration >= 1)
    psutil.Process(first.pid).kill()
    assert run.finish() == 0, run.text()
    assert first.url in run.text()
    assert run.log.finished()["ledger"] == {"trained": 96}
    assert len(set(run.trained())) == 96
    assert [batch.policy.iteration for batch in run.log.batches()] == [0, 1, 2, 3, 4, 5]  # new weights reached it
    assert psutil.pid_exists(second.pid)

    alone: Run = make_run("one", external([second], tmp_path), "external")
    alone.start()
    alone.wait_for(lambda log: log.last_iteration >= 1)
    psutil.Process(second.pid).kill()
    assert alone.finish() == 1, alone.text()
    assert second.url in alone.text().splitlines()[-1]
    assert not list(tmp_path.glob("*.safetensors"))
