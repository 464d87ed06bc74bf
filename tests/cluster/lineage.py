"""What a run's commit log says of its prompts, read where the store's credentials are: in the head's pod.

The head's Python runs ``log_reader.py``, which says what it found as JSON; it is judged here.
"""

import json
from dataclasses import dataclass
from pathlib import Path

from tests.cluster.kubernetes import Kubernetes
from tests.cluster.release import NAMESPACE, STORE, one_running

READER = Path(__file__).with_name("log_reader.py")
PATIENCE_S = 120.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Lineage:
    """What is in the store: reasons of attempts, committed iterations, and what became of prompts, by id."""

    attempts: tuple[str, ...]
    iterations: int
    trained: dict[str, int]
    """How often each prompt is in a committed batch to be trained on."""
    issued: tuple[str, ...]
    """The prompts that iterations up to the last are made of, by the run file and the size of its data alone."""
    other: dict[str, str]
    """What became of prompts that are not trained on."""
    metrics: tuple[int, ...]
    """Iterations whose metrics are there."""
    finished: bool

    def check(self) -> None:
        """Nothing is trained on twice, nothing is lost, and every iteration has its metrics."""
        assert {name: count for name, count in self.trained.items() if count != 1} == {}
        replaced = {name for name, outcome in self.other.items() if outcome.startswith("replaced:")}
        ended = self.trained.keys() | self.other.keys()
        assert set(self.issued) - ended == set(), "lost"
        assert {name for name in ended - set(self.issued) if "r" not in name} == set(), "never issued"
        assert len(ended) == len(self.issued) + len(replaced)
        assert set(range(1, self.iterations + 1)) - set(self.metrics) == set()


def lineage(kubernetes: Kubernetes, run: str, records: int) -> Lineage:
    """The run's, whose training data has that many records."""
    words = ("-", STORE, run, str(records))
    said = json.loads(in_head(kubernetes, "python", *words, stdin=READER.read_text()))
    return Lineage(**{name: tuple(value) if isinstance(value, list) else value for name, value in said.items()})


def in_head(kubernetes: Kubernetes, *command: str, stdin: str = "") -> str:
    """What a command in the head's container prints."""
    head = one_running(kubernetes, "headgroup")["metadata"]["name"]
    words = ("kubectl", "-n", NAMESPACE, "exec", "-i", head, "-c", "ray-head", "--", *command)
    return kubernetes.run(*words, stdin=stdin, timeout_s=PATIENCE_S)
