"""What the Dockerfiles promise, read from them: what building takes minutes to show, and a GPU machine to try."""

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

from tests.docker.dockerfiles import FOLDER, ROLES, ROOT, read

WITH_RAY = [role for role in ROLES if role != "operator"]
HADOLINT = Path(sys.executable).with_name("hadolint")
CHART = yaml.safe_load((ROOT / "charts/steadyhelm-cluster/values.yaml").read_text())
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
PIN = re.compile(r"^([A-Za-z0-9._-]+)(?:\[[^\]]*\])?==([^\s;,]+)$")


def pinned(requirements: list[str]) -> dict[str, str]:
    """Versions of those that name one exactly."""
    found = (PIN.match(requirement) for requirement in requirements)
    return {match[1].lower().replace("_", "-"): match[2] for match in found if match}


CONSTRAINTS = pinned((ROOT / "constraints.txt").read_text().splitlines())


each_role = pytest.mark.parametrize("role", ROLES)


def test_there_is_an_image_for_every_one_that_the_chart_can_name():
    examples = [
        yaml.safe_load(file.read_text()) for file in (ROOT / "charts/steadyhelm-cluster/examples").glob("*.yaml")
    ]
    named = {
        pool["image"].partition(":")[0]
        for values in (CHART, *examples)
        for pool in (values.get("defaults", {}), *values.get("pools", {}).values())
        if "image" in pool
    }
    assert named <= {f"steadyhelm-{role}" for role in ROLES}
    assert {"learner", "rollout-vllm", "rollout-sglang", "reward", "operator", "cpu"} <= set(ROLES)


def test_every_image_of_a_cluster_has_the_same_python():
    bases = {read(role).arguments["BASE"] for role in ROLES}
    (base,) = bases
    minor = re.search(r"python=(\S+)", (FOLDER / "environment").read_text())
    assert minor is not None
    assert base.startswith(f"python:{minor[1]}-")
    assert PROJECT["requires-python"] == f">={minor[1]}"
    places = {place for role in ROLES for place in re.findall(r"lib/python([\d.]+)/site-packages", read(role).text)}
    assert places == {minor[1]}


def test_what_builds_our_code_stays_below_its_next_major_version():
    (requirement,) = tomllib.loads((ROOT / "pyproject.toml").read_text())["build-system"]["requires"]
    assert re.search(r",<\d+$", requirement)


@pytest.mark.parametrize("role", WITH_RAY)
def test_every_image_with_ray_has_the_version_that_the_chart_names(role: str):
    requirements = [one for extra in read(role).extras for one in PROJECT["optional-dependencies"][extra]]
    assert pinned(requirements)["ray"] == CONSTRAINTS["ray"] == CHART["rayVersion"]


@each_role
def test_what_an_image_installs_is_pinned_as_the_constraints_say(role: str):
    file = read(role)
    installs = [run for stage in file.stages for run in stage.all("RUN") if "--requirement requirements.txt" in run]
    assert len(installs) == 1
    assert "--constraint constraints.txt" in installs[0]
    named = [one for extra in file.extras for one in PROJECT["optional-dependencies"][extra]]
    (environment,) = (stage for stage in file.stages if stage.name == "environment")
    named += [word for text in environment.all("ARG") for word in re.findall(r"[\w-]+==[\w.]+", text)]
    for package, version in pinned(named).items():
        assert CONSTRAINTS[package] == version
    missing = {re.split(r"[\[<>=~! ]", one, maxsplit=1)[0].lower() for one in named} - CONSTRAINTS.keys()
    assert not missing, "they would be of whatever version there is: make constraints"


@pytest.mark.parametrize("engine", ["vllm", "sglang"])
def test_an_engine_lies_in_an_environment_of_its_own_that_the_runtime_is_told_of(engine: str):
    file = read(f"rollout-{engine}")
    stage = next(stage for stage in file.stages if stage.name == "engine")
    (install,) = stage.all("RUN")
    pins = f"--constraint engines/{engine}.constraints.txt"
    assert f"/opt/engine {pins} --requirement engines/{engine}.txt ./engines/plugin" in install
    requirements = (ROOT / "engines" / f"{engine}.txt").read_text().splitlines()
    assert engine in pinned(requirements)
    assert f"STEADYHELM_{engine.upper()}_PYTHON=/opt/engine/bin/python" in file.stages[-1].all("ENV")[0]


@each_role
def test_nobody_is_root_and_the_user_is_the_charts(role: str):
    last = read(role).stages[-1]
    uid = CHART["uid"]
    assert last.all("USER") == [f"{uid}:{uid}"]
    assert f"--uid {uid}" in (FOLDER / "runtime").read_text()
    after = [word for word, _ in last.instructions[[word for word, _ in last.instructions].index("USER") :]]
    assert "RUN" not in after, "what runs after it could no longer write where it has to"


@each_role
def test_a_change_of_code_touches_the_last_layer_alone(role: str):
    file = read(role)
    copies = file.stages[-1].all("COPY")
    assert copies[-1] == "--from=code /opt/steadyhelm/code /opt/steadyhelm/code"
    of_code = {"system", "operators", "README.md", "pyproject.toml"}
    for stage in file.stages:
        if stage.name not in ("code", "requirements"):
            sources = {word for copy in stage.all("COPY") if "--from" not in copy for word in copy.split()[:-1]}
            assert not sources & of_code
    keywords = [word for word, _ in file.stages[-1].instructions]
    assert not {"COPY", "RUN"} & set(keywords[keywords.index("LABEL") :])


@each_role
def test_environments_are_copied_by_a_step_that_is_cached_and_never_stale(role: str):
    """buildah copies again to see whether it has copied the same before, and knows a RUN by its words alone."""
    steps = read(role).stages[-1].instructions
    of_stages = [place for place, (_, rest) in enumerate(steps) if re.search(r"from=(environment|engine)\b", rest)]
    found = [steps[place] for place in of_stages]
    for (word, copy), (then, run) in zip(found[::2], found[1::2], strict=True):
        stage, folder = re.fullmatch(r"--from=(\w+) (\S+)\.made /opt/\S*", copy).groups()
        assert (word, then) == ("COPY", "RUN")
        assert run.startswith(f"--mount=type=bind,from={stage},source={folder},target=/build/")
        assert run.endswith(f" {folder}")
    assert of_stages == list(range(of_stages[0], of_stages[-1] + 1)), "nothing stands between them"
    assert '"$folder.made"' in (FOLDER / "environment").read_text()


@each_role
def test_hadolint_finds_no_fault(role: str):
    done = subprocess.run([HADOLINT, FOLDER / f"{role}.Dockerfile"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_hadolint_finds_a_fault_where_there_is_one(tmp_path: Path):
    (tmp_path / "Dockerfile").write_text("FROM python\nRUN sudo make\n")
    done = subprocess.run([HADOLINT, tmp_path / "Dockerfile"], capture_output=True, text=True)
    assert {"DL3006", "DL3004"} <= set(re.findall(r"DL\d{4}", done.stdout)), done.stderr


@each_role
def test_the_runtime_stage_has_no_compiler(role: str):
    last = read(role).stages[-1]
    prepared, *copied = last.all("RUN")
    assert prepared == "--mount=type=bind,source=docker/runtime,target=/build/runtime /build/runtime"
    assert copied
    for copy in copied:
        assert re.fullmatch(r"--mount=type=bind,from=\w+,\S+ cp --archive /build/\w+ /opt/\S+", copy)
    installed = re.findall(r"apt-get install(?: --\S+)* (.+)", (FOLDER / "runtime").read_text())
    assert installed == ["wget"]
    assert all(copy.startswith(("--from=", "workloads ")) for copy in last.all("COPY"))


@each_role
def test_an_image_says_what_it_is(role: str):
    (text,) = read(role).stages[-1].all("LABEL")
    labels = dict(re.findall(r'org\.opencontainers\.image\.(\w+)="([^"]*)"', text))
    assert labels.keys() == {"title", "description", "licenses", "version", "revision"}
    assert labels["title"] == f"steadyhelm-{role}"
    assert labels["licenses"] == PROJECT["license"]


@each_role
def test_nothing_of_one_machine_and_no_secret_is_in_it(role: str):
    text = read(role).text + "".join((FOLDER / name).read_text() for name in ("environment", "requirements", "runtime"))
    assert not re.findall(r"https?://\S+", text)
    names = re.findall(r"(?:ARG|ENV|export) +(\w+)", text)
    assert not [name for name in names if re.search("TOKEN|SECRET|PASSWORD|CREDENTIAL|_KEY", name)]
    context = (ROOT / ".dockerignore").read_text().splitlines()
    assert context[0] == "*", "only what is named goes to the builder"
    assert not {"!.git", "!runs", "!tests"} & set(context)
    stand_ins = "operators/steadyhelm_operator/testing"
    assert context.index(stand_ins) > context.index("!operators"), "the last pattern that fits decides"
