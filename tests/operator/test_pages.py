"""The resources in the how-to page are ones that an API server takes."""

from pathlib import Path

import yaml
from steadyhelm_operator import resources

from tests.operator.judge import faults
from tests.unit.docs.markdown import DOCS, files


def test_the_run_in_the_how_to_is_a_training_run():
    page: Path = DOCS / "howto" / "training-runs.md"
    found = yaml.safe_load(files(page)["training-run.yaml"])
    assert faults(found) == []
    assert resources.desired({**found, "metadata": {**found["metadata"], "uid": "u"}}).problem == ""
