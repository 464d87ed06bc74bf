"""The how-to page: its resources are ones that an API server takes, its metrics are those that there are."""

import re
from pathlib import Path

import yaml
from steadyhelm_operator import resources
from steadyhelm_operator.metrics import Metrics

from tests.operator.judge import faults
from tests.unit.docs.markdown import DOCS, files

PAGE: Path = DOCS / "howto" / "training-runs.md"


def test_the_run_in_the_how_to_is_a_training_run():
    found = yaml.safe_load(files(PAGE)["training-run.yaml"])
    assert faults(found) == []
    assert resources.desired({**found, "metadata": {**found["metadata"], "uid": "u"}}).problem == ""


def test_the_how_to_tells_of_every_metric():
    told = re.findall(r"^\| `(steadyhelm_operator_\w+)`", PAGE.read_text(), re.MULTILINE)
    families = Metrics().registry.collect()
    assert sorted(told) == sorted(f"{found.name}{'_total' * (found.type == 'counter')}" for found in families)
