import io
import json
import logging
from collections.abc import Iterator

import pytest
from steadyhelm.telemetry import configure
from steadyhelm.telemetry.logs import redact, secret_values


@pytest.fixture(autouse=True)
def restored() -> Iterator[None]:
    logger = logging.getLogger("steadyhelm")
    before = (logger.handlers[:], logger.level, logger.propagate)
    yield
    logger.handlers[:], logger.level, logger.propagate = before


def test_a_line_for_people_names_the_service_and_the_level_of_anything_unusual():
    stream = io.StringIO()
    configure("human", stream=stream)
    logging.getLogger("steadyhelm.services.learner").info("step %d", 3)
    logging.getLogger("steadyhelm.loop").warning("waits")
    first, second = stream.getvalue().splitlines()
    assert first[8:] == " learner   step 3"
    assert second[8:] == " loop      WARNING waits"


def test_a_json_line_holds_extra_fields_and_the_traceback():
    stream = io.StringIO()
    configure("json", stream=stream)
    log = logging.getLogger("steadyhelm.runtime.groups")
    try:
        1 / 0  # noqa: B018
    except ZeroDivisionError:
        log.error("lost\nrank", extra={"rank": 1, "key": {1}}, exc_info=True)
    (text,) = stream.getvalue().splitlines()
    line = json.loads(text)
    assert (line["level"], line["source"], line["message"], line["rank"]) == ("error", "groups", "lost\nrank", 1)
    assert line["key"] == "{1}"
    assert "ZeroDivisionError" in line["traceback"]


@pytest.mark.parametrize("log_format", ["human", "json"])
def test_secrets_of_the_environment_never_appear(log_format, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "abc/def+123456")
    monkeypatch.setenv("HF_TOKEN", "hf_0123456789")
    stream = io.StringIO()
    configure(log_format, stream=stream)
    logging.getLogger("steadyhelm").info("with abc/def+123456", extra={"token": "hf_0123456789"})
    logging.getLogger("steadyhelm").info("at https://me:pw@host/x")
    assert "abc/def" not in stream.getvalue()
    assert "hf_0123" not in stream.getvalue()
    assert "me:pw" not in stream.getvalue()
    assert "https://***@host/x" in stream.getvalue()


def test_short_switches_are_no_secrets():
    assert secret_values({"USE_TOKEN": "true", "API_KEY": "0123456", "HOME": "/root/home"}) == ("0123456",)
    assert redact("a 0123456 b", ("0123456",)) == "a *** b"
