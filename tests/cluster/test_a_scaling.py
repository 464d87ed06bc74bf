"""The rollout pool follows the load of a run: engines come as actors, pods come for them, and both leave again."""

import shutil
from itertools import pairwise
from pathlib import Path

import pytest
import yaml
from steadyhelm.telemetry import metrics as names
from steadyhelm.telemetry.metrics_log import MetricsLine

from tests.cluster.kubernetes import Kubernetes
from tests.cluster.lineage import in_head, lineage
from tests.cluster.release import NAMESPACE, ROOT, STORE, api_answers, one_running, pods, steadyhelm
from tests.cluster.runs import document

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(900)]

TIDE = ROOT / "benchmarks" / "tide"
RUN = "tide-transformers"
PLACE = STORE.replace("/runs?", f"/runs/{RUN}?")
PAIRS = 1536
"""Of the task: 24 for each of its 64 iterations."""


def until_there_are(kubernetes: Kubernetes, engines: int) -> int:
    """Waits until so many engines are wanted and serve, in as many pods; returns the iteration."""
    seen = ""

    def so() -> bool:
        nonlocal seen
        said = document(kubernetes)
        assert said.get("phase", "running") in ("starting", "running"), said
        rollouts, standing = said.get("rollouts", {}), len(pods(kubernetes, "rollout"))
        seen = f"{rollouts}, {standing} pods"
        return (rollouts.get("desired"), rollouts.get("ready"), standing) == (engines, engines, engines)

    try:
        kubernetes.until(so, f"{engines} engines serve", seconds=240, namespace=NAMESPACE)
    except AssertionError as error:
        raise AssertionError(f"{error}\n{seen}") from None
    return int(document(kubernetes)["iteration"])


def test_the_rollout_pool_goes_from_one_to_three_under_load_and_back(
    kubernetes: Kubernetes, release: str, tmp_path: Path
):
    for file in TIDE.glob("*.*"):
        shutil.copy(file, tmp_path)
    run = yaml.safe_load((TIDE / "tide.yaml").read_text()) | {"store": {"uri": STORE}}
    (tmp_path / "tide.yaml").write_text(yaml.safe_dump(run))
    one_running(kubernetes, "rollout")
    kubernetes.until(lambda: api_answers(kubernetes), "the Ray API answers", seconds=120, namespace=NAMESPACE)
    steadyhelm(kubernetes, "submit", tmp_path / "tide.yaml", "--detach")

    until_there_are(kubernetes, 1)
    until_there_are(kubernetes, 3)
    watched = in_head(kubernetes, "steadyhelm", "watch", PLACE, "--once")
    assert "engines: " in watched
    assert ": engines " in watched, "every decision is seen, and why"
    last = until_there_are(kubernetes, 1)
    steadyhelm(kubernetes, "stop", RUN, seconds=200)

    left = lineage(kubernetes, RUN, PAIRS)
    left.check()
    assert left.iterations >= last
    assert left.other == {}, "every group is trained on"
    said = in_head(kubernetes, "steadyhelm", "report", PLACE, "--metrics")
    lines = [line for line in map(MetricsLine.parse, said.splitlines()) if names.ENGINES_DESIRED in line.metrics]
    for line in lines:
        (note,) = (note for note in line.notes if note.startswith("engines ") and "behind iteration" in note)
        assert f" behind iteration {line.iteration}: " in note
    wanted = [int(line.metrics[names.ENGINES_DESIRED]) for line in lines]
    assert len(lines) == left.iterations
    moves = [after - before for before, after in pairwise([1, *wanted]) if after != before]
    assert (max(wanted), wanted[-1]) == (3, 1)
    assert all(before > 0 or after < 0 for before, after in pairwise(moves)), "up with the load, and down with it"
