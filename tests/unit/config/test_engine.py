"""What a run file may say of engine servers."""

from typing import Any

import pytest
from pydantic import ValidationError
from steadyhelm.config.run import Rollout

SERVERS = ["http://a:1", "https://b:2"]


def rollout(urls: list[str], **more: Any) -> Rollout:
    engine = {"type": "external", "server": "sglang", "urls": urls, "weights_folder": "/mnt/weights"}
    return Rollout.model_validate({"engine": engine, "replicas": 2, **more})


def test_external_servers_are_one_for_each_rollout_actor() -> None:
    assert rollout(SERVERS).engine.type == "external"
    with pytest.raises(ValidationError, match=r"urls has 2 servers.*set rollout\.replicas to 2"):
        rollout(SERVERS, replicas=3)
    with pytest.raises(ValidationError, match="the number of servers is fixed"):
        rollout(SERVERS, scaling={"min": 1, "max": 2})


@pytest.mark.parametrize(
    ("urls", "why"),
    [
        ([], "urls"),
        (["b:2", "http://a:1"], r"urls\[0\] is no address"),
        (["http://a:1", "http://"], r"urls\[1\] is no address"),
        (["http://a:1", "http://a:1"], "twice"),
    ],
)
def test_urls_that_are_none_or_repeat_are_refused(urls: list[str], why: str) -> None:
    with pytest.raises(ValidationError, match=why):
        rollout(urls)


def test_a_secret_in_a_url_is_refused_with_the_place_for_it() -> None:
    with pytest.raises(ValidationError, match="key_variable") as caught:
        rollout(["http://me:secret@a:1", "http://b:2"])
    assert "secret" not in caught.value.errors()[0]["msg"]
