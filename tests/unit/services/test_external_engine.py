"""What a rollout actor makes of engine servers that somebody else runs, before it has asked them anything."""

from pathlib import Path
from typing import Any

import pytest
from steadyhelm.config.run import Data, Model, Rollout
from steadyhelm.data.types import PolicyVersion
from steadyhelm.errors import ConfigError
from steadyhelm.services.rollout.served import ServedEngine
from steadyhelm.services.rollout.worker import RolloutSpec, make_encoder, make_engine
from steadyhelm.store import open_store

URLS = ("http://127.0.0.1:9", "http://127.0.0.1:10")


def engine(model: Path, weights: Path, slot: int, **more: Any) -> ServedEngine:
    given = {"type": "external", "server": "sglang", "urls": URLS, "weights_folder": str(weights), **more}
    store = open_store(str(weights / "store"))
    spec = RolloutSpec(
        model=Model(path=str(model), dtype="float32"),
        data=Data(train="digits.py:train"),
        rollout=Rollout.model_validate({"engine": given, "replicas": len(URLS)}),
        folder=str(model),
        store_uri=store.uri,
        version=PolicyVersion(iteration=0, attempt=1),
        slot=slot,
    )
    made = make_engine(spec, make_encoder(str(model), spec.model, spec.data, store), store)
    assert isinstance(made, ServedEngine)
    return made


@pytest.mark.parametrize("slot", [0, 1])
async def test_each_actor_has_the_server_of_its_slot(tiny_model: Path, tmp_path: Path, slot: int) -> None:
    made = engine(tiny_model, tmp_path, slot)
    assert made._server.url == URLS[slot]
    await made.close()


def test_a_key_or_a_folder_that_the_actor_does_not_have_is_told_with_the_remedy(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("NO_SUCH_KEY", raising=False)
    with pytest.raises(ConfigError, match="'NO_SUCH_KEY', but the rollout actors have no such variable"):
        engine(tiny_model, tmp_path, 0, key_variable="NO_SUCH_KEY")
    with pytest.raises(ConfigError, match="no folder that the rollout actors can write to"):
        engine(tiny_model, tmp_path, 0, weights_folder=str(tmp_path / "nowhere"))
