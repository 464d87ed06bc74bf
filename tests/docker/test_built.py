"""The images that run without a GPU, built for real and run: what reading their Dockerfiles cannot show."""

import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from tests.docker.dockerfiles import ROOT
from tests.programs import fetched

pytestmark = [pytest.mark.images, pytest.mark.timeout(300)]

CHART = yaml.safe_load((ROOT / "charts/steadyhelm-cluster/values.yaml").read_text())
VERSION = yaml.safe_load((ROOT / "charts/steadyhelm-cluster/Chart.yaml").read_text())["appVersion"]
CACHE = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "steadyhelm" / "images"
STORAGE = CACHE / "storage"
"""Where `.ci/node-images` builds."""
each_built = pytest.mark.parametrize("role", ["cpu", "operator"])


def buildah(*words: str | Path) -> str:
    command = ["buildah", "--root", STORAGE, "--runroot", f"{STORAGE}.run", *words]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=240, env={**os.environ, "TMPDIR": str(CACHE)}
    )
    assert done.returncode == 0, f"{words}: {done.stdout[-2000:]}{done.stderr[-2000:]}"
    return done.stdout


def image(role: str) -> str:
    return f"localhost/steadyhelm-{role}:{VERSION}"


@pytest.fixture(scope="module")
def containers() -> Iterator[dict[str, str]]:
    if shutil.which("buildah") is None or os.geteuid() != 0:
        pytest.skip("building images takes buildah and root here; see `make images` for docker")
    fetched("node-images")
    made = {role: buildah("from", "--pull-never", image(role)).strip() for role in ("cpu", "operator")}
    yield made
    for name in made.values():
        buildah("rm", name)


def run(container: str, *words: str) -> str:
    """What a command prints in it, as the user that the image names; without a network."""
    return buildah("run", "--isolation", "chroot", container, "--", *words).strip()


@each_built
def test_an_image_says_what_it_is_and_of_which_revision(containers: dict[str, str], role: str):
    config = json.loads(buildah("inspect", "--type", "image", image(role)))["OCIv1"]["config"]
    labels = {name.removeprefix("org.opencontainers.image."): text for name, text in config["Labels"].items()}
    assert labels["title"] == f"steadyhelm-{role}"
    assert labels["version"] == VERSION
    assert len(labels["revision"]) == 40
    assert config["User"] == f"{CHART['uid']}:{CHART['uid']}"


@each_built
def test_nobody_in_particular_finds_what_probes_call_and_no_compiler(containers: dict[str, str], role: str):
    assert run(containers[role], "id", "-u") == str(CHART["uid"])
    found = run(containers[role], "bash", "-c", "command -v bash wget gcc cc c++ ld make || true").splitlines()
    assert [Path(line).name for line in found] == ["bash", "wget"]


def test_all_images_have_one_python(containers: dict[str, str]):
    versions = {
        run(container, "python", "-c", "import sys; print(sys.version_info[:2])") for container in containers.values()
    }
    assert versions == {"(3, 11)"}


def test_the_operators_image_has_the_operator_and_neither_ray_nor_torch(containers: dict[str, str]):
    script = "from importlib.util import find_spec; import steadyhelm_operator.controller; "
    script += "print([find_spec(name) is not None for name in ('kopf', 'ray', 'torch', 'steadyhelm_operator.testing')])"
    assert run(containers["operator"], "python", "-c", script) == "[True, False, False, False]"


def test_the_cpu_image_has_the_charts_ray_and_reads_the_run_files_that_it_brings(containers: dict[str, str]):
    script = "import ray, torch, deepspeed, transformers; print(ray.__version__)"
    assert run(containers["cpu"], "python", "-c", script).splitlines()[-1] == CHART["rayVersion"]
    told = run(containers["cpu"], "steadyhelm", "validate", "/opt/steadyhelm/workloads/r1_reward/digits.yaml")
    assert "digits.yaml is valid" in told


def test_the_codec_comes_compiled_for_the_processor_that_built_the_image(containers: dict[str, str]):
    script = "import torch; from steadyhelm.weights import blocks, kernels; blocks.compile_for(torch.bfloat16); "
    script += "print([sum(it.stats.cache_misses.values()) for it in (kernels.compare, kernels.encode, kernels.decode)])"
    assert run(containers["cpu"], "python", "-c", script).splitlines()[-1] == "[0, 0, 0]"
