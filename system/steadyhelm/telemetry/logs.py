"""Log lines: for people on a terminal, as JSON for machines; secrets of the environment never appear in either."""

from __future__ import annotations

import json
import logging
import os
import re
import sys
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from typing import Literal, TextIO

LogFormat = Literal["human", "json"]

SECRET_NAME = re.compile(r"SECRET|TOKEN|PASSWORD|PASSWD|CREDENTIAL|API_?KEY|ACCESS_?KEY|PRIVATE_?KEY", re.IGNORECASE)
"""Environment variables of such names hold values that no log line may show."""
_USER_IN_URL = re.compile(r"(?<=://)[^/\s@]+@")
_SHORTEST_SECRET = 6  # shorter values ("1", "true") are switches; hiding them would garble ordinary text


def secret_values(environment: Mapping[str, str]) -> tuple[str, ...]:
    """The values of ``environment`` that must not be shown, longest first."""
    found = {v for k, v in environment.items() if SECRET_NAME.search(k) and len(v) >= _SHORTEST_SECRET}
    return tuple(sorted(found, key=lambda value: (-len(value), value)))


def redact(text: str, secrets: Iterable[str]) -> str:
    """``text`` with each of ``secrets`` and each ``user:password@`` of a URL replaced by ``***``."""
    for secret in secrets:
        text = text.replace(secret, "***")
    return _USER_IN_URL.sub("***@", text)


class HumanFormatter(logging.Formatter):
    """``12:00:00 rollout  text``, the level in front of anything above INFO; times are local."""

    def __init__(self, secrets: tuple[str, ...] = ()) -> None:
        super().__init__()
        self._secrets = secrets

    def format(self, record: logging.LogRecord) -> str:
        """One line; a traceback follows where the record carries one."""
        clock = datetime.fromtimestamp(record.created).astimezone().strftime("%H:%M:%S")
        level = f"{record.levelname} " if record.levelno > logging.INFO else ""
        text = f"{clock} {_source(record):<9} {level}{record.getMessage()}"
        if record.exc_info:
            text += "\n" + self.formatException(record.exc_info)
        return redact(text, self._secrets)


class JsonFormatter(logging.Formatter):
    """``{"time": …, "level": …, "source": …, "message": …, <extra fields>}``; times are UTC with milliseconds."""

    _STANDARD = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}

    def __init__(self, secrets: tuple[str, ...] = ()) -> None:
        super().__init__()
        self._secrets = secrets

    def format(self, record: logging.LogRecord) -> str:
        """One JSON object on one line; values that JSON cannot hold are shown as their ``repr``."""
        line: dict[str, object] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "source": _source(record),
            "message": record.getMessage(),
            "pid": record.process,
        }
        line |= {key: value for key, value in vars(record).items() if key not in self._STANDARD}
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return redact(json.dumps(line, default=repr, ensure_ascii=False), self._secrets)


def _source(record: logging.LogRecord) -> str:
    """The service that speaks: the logger's name below ``steadyhelm``."""
    return record.name.removeprefix("steadyhelm.").rsplit(".", 1)[-1]


def configure(log_format: LogFormat = "human", level: int = logging.INFO, stream: TextIO | None = None) -> None:
    """Sends the log of every ``steadyhelm`` logger to ``stream`` (stderr), in place of an earlier set-up.

    Other libraries' loggers are left alone.
    """
    secrets = secret_values(os.environ)
    handler = logging.StreamHandler(stream or sys.stderr)
    handler.setFormatter(JsonFormatter(secrets) if log_format == "json" else HumanFormatter(secrets))
    logger = logging.getLogger("steadyhelm")
    logger.handlers[:] = [handler]
    logger.setLevel(level)
    logger.propagate = False
