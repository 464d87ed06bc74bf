"""An engine server beside a learner that publishes in shared memory."""

import asyncio
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import xxhash
from steadyhelm.data.types import PolicyVersion
from steadyhelm.errors import CorruptObjectError
from steadyhelm.models.encoder import PromptEncoder
from steadyhelm.services.rollout.served import ServedEngine
from steadyhelm.testing.memory_store import MemoryStore
from steadyhelm.weights import local
from steadyhelm.weights.local import LocalWeights

from tests.unit.services.test_served_engine import FIRST, NEXT, Process, Script


class Watched(Script):
    """A dialect that remembers which files it was given."""

    def __init__(self) -> None:
        super().__init__()
        self.inodes: list[int] = []

    async def stage(self, server: Any, file: Path, digest: str) -> None:
        await super().stage(server, file, digest)
        assert xxhash.xxh3_128_hexdigest(self.staged) == digest
        self.inodes.append((await asyncio.to_thread(file.stat)).st_ino)


class Layout:
    """Of a model folder whose names are those of the published tensors, or not."""

    def __init__(self, prefix: str) -> None:
        self.prefix = prefix

    def distinct(self, tensors: Mapping[str, torch.Tensor], version: PolicyVersion) -> dict[str, torch.Tensor]:
        return {self.prefix + name: tensor for name, tensor in tensors.items()}


@pytest.fixture
def memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where publishers put their files."""
    folder = tmp_path / "memory"
    folder.mkdir()
    monkeypatch.setattr(local, "memory_folder", lambda num_bytes: folder)
    return folder


def engine_in(scratch: Path, model: Path, script: Watched, layout: Layout, reader: LocalWeights) -> ServedEngine:
    scratch.mkdir()
    return ServedEngine(
        "http://127.0.0.1:9",
        process=Process(scratch),  # type: ignore[arg-type]  # as much of one as it needs
        dialect=script,
        encoder=PromptEncoder(model, min_pixels=3136, max_pixels=100352),
        layout=layout,  # type: ignore[arg-type]
        version=FIRST,
        fetch=reader.fetch,
        deadline_s=5.0,
    )


@pytest.mark.parametrize(("prefix", "same"), [("", True), ("model.", False)])
async def test_a_server_is_given_the_very_file_in_shared_memory_where_its_names_are_the_servers(
    tmp_path: Path, tiny_model: Path, memory: Path, prefix: str, same: bool
) -> None:
    scratch = tmp_path / "scratch"
    store, script = MemoryStore(), Watched()
    publisher, reader = LocalWeights(store), LocalWeights(store)
    record = publisher.publish(NEXT, "run/weights/5.2", {"weight": torch.randn(50)})
    engine = engine_in(scratch, tiny_model, script, Layout(prefix), reader)
    await engine.apply_weights(record)
    await engine.close()
    published = reader.fetch(record).path
    assert (script.inodes == [published.stat().st_ino]) == same
    assert prefix.encode() + b"weight" in script.staged
    assert list(scratch.iterdir()) == []
    publisher.close()


async def test_a_name_of_the_learners_file_that_was_left_behind_is_never_written_through(
    tmp_path: Path, tiny_model: Path, memory: Path
) -> None:
    scratch = tmp_path / "scratch"
    store, script = MemoryStore(), Watched()
    publisher, reader = LocalWeights(store), LocalWeights(store)
    record = publisher.publish(NEXT, "run/weights/5.2", {"weight": torch.randn(50)})
    published = reader.fetch(record)
    engine = engine_in(scratch, tiny_model, script, Layout("model."), reader)
    script.stage_error = CorruptObjectError("digest")
    with pytest.raises(CorruptObjectError):
        await engine.apply_weights(record)
    assert script.file is not None
    for left in (script.file, script.file.with_name(script.file.name.replace("5.2", "4.2"))):
        assert published.link(left) is not None  # as an actor leaves them that is killed while it stages
    before = published.path.read_bytes()
    script.stage_error = None
    await engine.apply_weights(record)
    await engine.close()
    assert published.path.read_bytes() == before
    assert list(scratch.iterdir()) == []
    publisher.close()
