"""TrainingRuns of the tests."""

from typing import Any

FILES = {"task.py": "", "a.py": ""}


def run_file(**parts: Any) -> dict[str, Any]:
    """The smallest run file, with parts put in."""
    least: dict[str, Any] = {
        "name": "digits",
        "model": {"factory": "task.py:model"},
        "data": {"train": "task.py:pairs"},
        "schedule": {"iterations": 60},
    }
    return {**least, **parts}


def training_run(run: dict[str, Any] | None = None, *, name: str = "digits", **spec: Any) -> dict[str, Any]:
    """A TrainingRun as the API server holds it."""
    return {
        "apiVersion": "steadyhelm.dev/v1alpha1",
        "kind": "TrainingRun",
        "metadata": {"name": name, "namespace": "ns", "uid": f"uid-of-{name}", "generation": 1, "resourceVersion": "1"},
        "spec": {"run": run or run_file(), "cluster": {"name": "rl"}, "files": FILES, **spec},
    }
