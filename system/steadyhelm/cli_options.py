"""Options and arguments that several commands have."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer


class LogFormat(StrEnum):
    """How log lines look."""

    HUMAN = "human"
    JSON = "json"


RunPath = Annotated[Path, typer.Argument(metavar="FILE", help="The run file (YAML).", show_default=False)]
Sets = Annotated[
    list[str] | None,
    typer.Option(
        "--set", metavar="PATH=VALUE", help="Replaces a value of the run file, e.g. learner.lr=1e-5; repeatable."
    ),
]
RunId = Annotated[str, typer.Option("--id", help="Id of the run in the store; default: its name and engine.")]
TakeOver = Annotated[bool, typer.Option("--take-over", help="Go on although another driver seems alive; it is fenced.")]
AcceptChanges = Annotated[
    bool, typer.Option("--accept-changes", help="Go on although the run file differs from the run's.")
]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Show warnings and errors only.")]
Logs = Annotated[LogFormat, typer.Option("--log-format", help="Log lines on stderr, for people or as JSON.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show debug lines, and the traceback of an error.")]
