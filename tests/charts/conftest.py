"""Rendering charts with helm, and judging what comes out by the schemas of Kubernetes and of the operators."""

import json
import os
import subprocess
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import yaml

from tests.charts.objects import CLUSTER, Manifest
from tests.charts.schemas import Judge, custom_resources
from tests.programs import fetched

Render = Callable[..., list[Manifest]]


@pytest.fixture(scope="session")
def helm() -> Path:
    """helm's executable: the machine's, or one that Go builds once."""
    return fetched("helm")


@pytest.fixture(scope="session")
def judge() -> Judge:
    """Kubernetes' own schemas, the Prometheus operator's, and KubeRay's where STEADYHELM_KUBERAY_CRDS names them."""
    folder = fetched("crds")
    files = [folder / f"monitoring.coreos.com_{kind}.yaml" for kind in ("podmonitors", "prometheusrules")]
    if "STEADYHELM_KUBERAY_CRDS" in os.environ:
        files += sorted(Path(os.environ["STEADYHELM_KUBERAY_CRDS"]).glob("*.yaml"))
    return Judge(custom_resources(files))


@pytest.fixture(scope="session")
def render(helm: Path, tmp_path_factory: pytest.TempPathFactory) -> Render:
    """Renders the cluster's chart: ``render(values, release="rl")``. Raises ValueError with what helm says."""
    folder = tmp_path_factory.mktemp("helm")
    environment = {**os.environ, **{f"HELM_{name}_HOME": str(folder) for name in ("CACHE", "CONFIG", "DATA")}}

    def rendered(values: Mapping[str, object], release: str = "rl") -> list[Manifest]:
        file = folder / "values.yaml"
        file.write_text(json.dumps(values))  # JSON is YAML of which nobody doubts what "n" is
        command = [helm, "template", release, CLUSTER, "--namespace", "ns", "--values", file]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
        if done.returncode:
            raise ValueError(done.stderr)
        return [found for found in yaml.load_all(done.stdout, yaml.CSafeLoader) if found]

    return rendered
