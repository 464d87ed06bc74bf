"""What the Dockerfiles install can be had: resolved against the package index as a build would, image by image."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.docker.dockerfiles import FOLDER, ROLES, ROOT, read

pytestmark = [pytest.mark.images, pytest.mark.timeout(300)]

ENVIRONMENTS = {
    " ".join(words).replace(" requirements.txt", f" [{','.join(read(role).extras)}]"): (read(role).extras, words)
    for role in ROLES
    for words in read(role).installs
}
"""Each once: several roles have the same. The extras of its ``requirements.txt``, and the words of the installation."""
PYTHON, UV = re.findall(r"^python=(\S+) uv=(\S+)$", (FOLDER / "environment").read_text(), re.MULTILINE)[0]


@pytest.fixture(scope="module")
def build(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as builds see it, and an empty environment of the images' Python."""
    folder = tmp_path_factory.mktemp("build")
    for name in ("pyproject.toml", "constraints.txt", "docker/requirements"):
        shutil.copy(ROOT / name, folder)
    shutil.copytree(ROOT / "engines", folder / "engines")
    uv(folder, "venv", "--quiet", "--python", PYTHON, "empty")
    return folder


def uv(folder: Path, *words: str) -> str:
    done = subprocess.run([ROOT / ".ci" / "uv", *words], cwd=folder, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, f"uv {' '.join(words)}:\n{done.stderr}"
    return done.stdout + done.stderr


def resolved(build: Path, words: list[str]) -> set[str]:
    """The packages, with versions, that an image's environment would have."""
    said = uv(build, "pip", "install", "--dry-run", "--python", "empty/bin/python", *words)
    return set(re.findall(r"^ \+ (\S+)$", said, re.MULTILINE))


@pytest.mark.parametrize(("extras", "words"), ENVIRONMENTS.values(), ids=ENVIRONMENTS)
def test_an_environment_resolves_to_what_it_names(build: Path, extras: list[str], words: list[str]):
    lines = subprocess.run(["./requirements", *extras], cwd=build, capture_output=True, text=True, check=True).stdout
    (build / "requirements.txt").write_text(lines)
    found = resolved(build, words)
    named = {word for word in words if "==" in word}
    pinned = set(named)
    for file in re.findall(r"\S+(?<!requirements)\.txt", " ".join(words)):
        pins = re.findall(r"^[\w.-]+==\S+$", (build / file).read_text(), re.MULTILINE)
        pinned.update(pins)
        if "constraints" not in file:
            named.update(pins)
    assert named <= found
    assert found <= pinned, "what comes along is not pinned: `make constraints`"
    assert len(found) > 20


def test_the_uv_that_builds_can_be_had(build: Path):
    assert f"uv=={UV}" in resolved(build, [f"uv=={UV}"])


def test_a_pin_that_does_not_exist_is_found(build: Path):
    with pytest.raises(AssertionError, match="no version of pyyaml==999"):
        resolved(build, ["pyyaml==999"])
