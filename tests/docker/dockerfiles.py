"""Reading of the Dockerfiles."""

import re
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "docker"
ROLES = sorted(file.stem for file in FOLDER.glob("*.Dockerfile"))


@dataclass(frozen=True, slots=True)
class Stage:
    """A stage: its image, its name, and its instructions as (keyword, rest)."""

    image: str
    name: str
    instructions: list[tuple[str, str]] = field(default_factory=list)

    def all(self, keyword: str) -> list[str]:
        """What follows each of its instructions of that keyword."""
        return [rest for word, rest in self.instructions if word == keyword]

    @property
    def defaults(self) -> dict[str, str]:
        """Of its arguments, those that have one."""
        return dict(re.findall(r'^(\w+)="?([^"]*)"?$', "\n".join(self.all("ARG")), re.MULTILINE))

    @property
    def installs(self) -> list[list[str]]:
        """Of each environment that it makes: the words of `uv pip install`, with the arguments' defaults in them."""
        texts = re.findall(r"\./environment /opt/(?:steadyhelm/venv|engine) ([^&\n]+)", "\n".join(self.all("RUN")))
        return [re.sub(r"\$\{(\w+)\}", lambda name: self.defaults[name[1]], text).split() for text in texts]


@dataclass(frozen=True, slots=True)
class Dockerfile:
    """A Dockerfile: the arguments before its first stage, and its stages."""

    arguments: dict[str, str]
    stages: list[Stage]

    @property
    def text(self) -> str:
        """Its instructions, one a line."""
        return "\n".join(f"{word} {rest}" for stage in self.stages for word, rest in stage.instructions)

    @property
    def extras(self) -> list[str]:
        """The project's extras of which its ``requirements.txt`` is made."""
        (words,) = re.findall(r"^RUN \./requirements (.+) >requirements\.txt$", self.text, re.MULTILINE)
        return words.split()

    @property
    def installs(self) -> list[list[str]]:
        """Of each environment that it makes: the words of `uv pip install`."""
        return [words for stage in self.stages for words in stage.installs]


def read(role: str) -> Dockerfile:
    """The Dockerfile of a role."""
    lines = [line for line in (FOLDER / f"{role}.Dockerfile").read_text().splitlines() if not line.startswith("#")]
    arguments: dict[str, str] = {}
    stages: list[Stage] = []
    for line in filter(None, re.sub(r"\\\n\s*", "", "\n".join(lines)).splitlines()):
        word, _, rest = line.partition(" ")
        if word == "FROM":
            image, _, name = rest.partition(" AS ")
            stages.append(Stage(image, name))
        elif stages:
            stages[-1].instructions.append((word, rest))
        else:
            assert word == "ARG"
            name, _, value = rest.partition("=")
            arguments[name] = value
    return Dockerfile(arguments, stages)
