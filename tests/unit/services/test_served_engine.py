"""What an engine makes of a server that answers wrongly, over a dialect that a test has in its hands."""

import asyncio
import resource
import threading
from collections.abc import AsyncIterator
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from steadyhelm.data.types import EngineRequest, FinishReason, PolicyVersion, PromptId, Sampling, WeightsRecord
from steadyhelm.errors import (
    CorruptObjectError,
    DataError,
    EngineLostError,
    NonFiniteError,
    ResourceError,
    RetryableError,
)
from steadyhelm.models.encoder import PromptEncoder
from steadyhelm.models.layout import ModelLayout
from steadyhelm.models.load import load_model
from steadyhelm.services.rollout.served import Answer, Ask, Guest, ServedEngine, WeightsFetch

FIRST, NEXT = PolicyVersion(iteration=4, attempt=2), PolicyVersion(iteration=5, attempt=2)


class Script:
    """A dialect that answers as the test says."""

    def __init__(self) -> None:
        self.mark = self.version = ""
        self.labels: list[str] = []
        self.asked: list[Ask] = []
        self.changes: dict[str, Any] = {}
        self.both = asyncio.Event()
        self.wait = asyncio.Event()
        self.wait.set()
        self.stage_error: Exception | None = None
        self.swap_error: Exception | None = None
        self.staged = b""
        self.file: Path | None = None

    async def name_weights(self, server: Any, label: str) -> None:
        self.name(label)

    def name(self, label: str) -> None:
        self.labels.append(label)
        self.mark, _, self.version = label.partition(":")

    async def complete(self, server: Any, ask: Ask, deadline_s: float) -> Answer:
        self.asked.append(ask)
        if len(self.asked) == 2:
            self.both.set()
        label = self.version
        await self.wait.wait()
        answer = Answer(
            tokens=[9, 10, 2],
            logprobs=[-1.0, -2.0, -0.5],
            spans=((label, 0, 3),),
            finish=FinishReason.STOP,
            prompt_length=ask.expanded,
        )
        answer = replace(answer, **self.changes)
        marked = ((label if ":" in label else f"{self.mark}:{label}", *rest) for label, *rest in answer.spans)
        return replace(answer, spans=tuple(marked))

    async def stage(self, server: Any, file: Path, digest: str) -> None:
        self.file = file
        self.staged = await asyncio.to_thread(file.read_bytes)
        if self.stage_error:
            raise self.stage_error

    async def swap(self, server: Any, file: Path, digest: str, label: str, *, abort: bool) -> None:
        if self.swap_error:
            raise self.swap_error
        self.name(label)


class Process:
    """What the engine knows of its server's process."""

    def __init__(self, scratch: Path) -> None:
        self.key, self.scratch, self.ended, self.ends = "", scratch, Future(), 0

    def end(self) -> None:
        self.ends += 1

    close = end

    def tail(self) -> str:
        return "the log"


@pytest.fixture
def script() -> Script:
    return Script()


@pytest.fixture
def process(tmp_path: Path) -> Process:
    return Process(tmp_path)


def the_tensors(model: Path) -> dict[str, Any]:
    return dict(load_model(model, dtype="float32").state_dict())


def served(
    script: Script, process: Any, model: Path, tensors: dict[str, Any], fetch: WeightsFetch | None = None
) -> ServedEngine:
    return ServedEngine(
        "http://127.0.0.1:9",
        process=process,
        dialect=script,
        encoder=PromptEncoder(model, min_pixels=3136, max_pixels=100352),
        layout=ModelLayout(model, dtype="float32"),
        version=FIRST,
        fetch=fetch or (lambda _: tensors),
        deadline_s=5.0,
    )


@pytest.fixture
async def engine(script: Script, process: Process, tiny_model: Path) -> AsyncIterator[ServedEngine]:
    made = served(script, process, tiny_model, the_tensors(tiny_model))
    yield made
    await made.close()


def request(*tokens: int) -> EngineRequest:
    return EngineRequest(
        prompt_id=PromptId("0:1"), prompt_tokens=np.asarray(tokens or (20, 21), np.int32), images=(), seed=1
    )


def record(version: PolicyVersion) -> WeightsRecord:
    return WeightsRecord(version=version, objects=(), checksum="")


async def sample(engine: ServedEngine, *requests: EngineRequest) -> list[Any]:
    return [done async for done in engine.generate(requests or [request()], Sampling(max_new_tokens=3))]


async def test_versions_of_tokens_are_the_spans_of_the_answer(engine: ServedEngine, script: Script) -> None:
    script.changes = {"spans": (("4.2", 0, 1), ("5.2", 1, 3))}
    (done,) = await sample(engine)
    assert done.versions.tolist() == [4, 5, 5]
    assert done.attempt == 2


@pytest.mark.parametrize(
    "changes",
    [
        {"spans": ((":default", 0, 3),)},  # weights that nobody named
        {"spans": (("another:4.2", 0, 3),)},  # of another run
        {"spans": (("3.2", 0, 3),)},  # stale
        {"spans": (("5.2", 0, 1), ("4.2", 1, 3))},  # back again
        {"spans": (("4.2", 0, 2),)},  # a token of no version
        {"spans": ()},
        {"logprobs": [-1.0, -2.0]},
    ],
)
async def test_answers_of_weights_that_are_not_the_named_ones_lose_the_server(
    engine: ServedEngine, script: Script, changes: dict[str, Any]
) -> None:
    script.changes = changes
    with pytest.raises(EngineLostError):
        await sample(engine)
    script.changes = {}
    with pytest.raises(EngineLostError):
        await engine.health()


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"finish": FinishReason.ABORT}, RetryableError),
        ({"tokens": [], "logprobs": [], "spans": ()}, RetryableError),
        ({"spans": (("4.3", 0, 3),)}, RetryableError),
        ({"logprobs": [-1.0, -9999.0, -0.5]}, NonFiniteError),
        ({"logprobs": [-1.0, float("nan"), -0.5]}, NonFiniteError),
        ({"prompt_length": 7}, DataError),
    ],
)
async def test_other_wrong_answers_are_errors_of_their_request(
    engine: ServedEngine, script: Script, changes: dict[str, Any], error: type[Exception]
) -> None:
    script.changes = changes
    with pytest.raises(error) as caught:
        await sample(engine)
    assert not isinstance(caught.value, EngineLostError)
    script.changes = {}
    assert len(await sample(engine)) == 1


async def test_bad_requests_never_reach_the_server(engine: ServedEngine, script: Script) -> None:
    for bad in (request(20, 99999), request(-1), request(6), replace(request(), prompt_tokens=np.zeros(0, np.int32))):
        with pytest.raises(DataError, match="0:1"):
            await sample(engine, bad)
    assert script.asked == []


async def test_weights_that_the_server_cannot_read_leave_the_old_ones_serving(
    engine: ServedEngine, script: Script, process: Process
) -> None:
    script.stage_error = CorruptObjectError("digest")
    with pytest.raises(CorruptObjectError):
        await engine.apply_weights(record(NEXT))
    assert engine.version == FIRST
    assert (await sample(engine))[0].versions.tolist() == [4, 4, 4]
    assert list(process.scratch.iterdir()) == []


async def test_weights_that_find_no_room_are_told_with_the_folder_and_leave_nothing_there(
    engine: ServedEngine, script: Script, process: Process
) -> None:
    limit, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, hard))  # which a disk that fills up is like
    try:
        with pytest.raises(ResourceError, match=rf"weights 5\.2 cannot be written to {process.scratch} .*give it room"):
            await engine.apply_weights(record(NEXT))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    assert list(process.scratch.iterdir()) == []
    await engine.apply_weights(record(NEXT))
    assert engine.version == NEXT


async def test_weights_that_are_still_being_fetched_when_their_call_is_cancelled_meet_no_others(
    script: Script, process: Process, tiny_model: Path
) -> None:
    begun, go_on = threading.Event(), threading.Event()
    found = the_tensors(tiny_model)
    fetching: list[WeightsRecord] = []

    def fetch(weights: WeightsRecord) -> dict[str, Any]:
        fetching.append(weights)
        assert len(fetching) == 1
        begun.set()
        assert go_on.wait(30)
        fetching.remove(weights)
        return found

    engine = served(script, process, tiny_model, found, fetch)
    first = asyncio.create_task(engine.apply_weights(record(NEXT)))
    await asyncio.to_thread(begun.wait, 30)
    first.cancel()
    second = asyncio.create_task(engine.apply_weights(record(NEXT)))
    await asyncio.sleep(0.05)
    go_on.set()
    with pytest.raises(asyncio.CancelledError):
        await first
    await second
    assert engine.version == NEXT
    assert list(process.scratch.iterdir()) == []
    await engine.close()


@pytest.mark.parametrize("error", [EngineLostError("half"), DataError("400"), RetryableError("500")])
async def test_a_swap_that_fails_ends_the_server(
    engine: ServedEngine, script: Script, process: Process, error: Exception
) -> None:
    script.swap_error = error
    with pytest.raises(EngineLostError, match=r"weights 5\.2 were not swapped in as a whole"):
        await engine.apply_weights(record(NEXT))
    assert process.ends == 1
    assert engine.version == FIRST
    with pytest.raises(EngineLostError, match="as a whole"):
        await engine.health()


async def test_a_server_that_is_lost_sends_back_what_is_in_flight(
    engine: ServedEngine, script: Script, process: Process
) -> None:
    script.wait.clear()
    work = asyncio.create_task(sample(engine, request(), replace(request(), prompt_id=PromptId("0:2"))))
    await script.both.wait()
    engine._server.lose("its process ended")
    with pytest.raises(EngineLostError, match="its process ended"):
        await asyncio.wait_for(work, 5)


async def test_weights_are_written_once_under_the_names_of_model_folders(
    engine: ServedEngine, script: Script, tiny_model: Path
) -> None:
    await engine.apply_weights(record(NEXT))
    assert b"embed_tokens.weight" in script.staged
    assert b"lm_head.weight" not in script.staged  # it is the embedding
    assert len(script.staged) < (tiny_model / "model.safetensors").stat().st_size * 1.1


@pytest.fixture
async def guest(script: Script, tiny_model: Path, tmp_path: Path) -> AsyncIterator[ServedEngine]:
    """An engine over a server that somebody else runs."""
    tensors = the_tensors(tiny_model)
    made = served(script, Guest(key="", folder=tmp_path, first=lambda: tensors), tiny_model, tensors)
    yield made
    await made.close()


async def test_a_guest_brings_its_first_weights_before_it_asks_for_anything(
    guest: ServedEngine, script: Script
) -> None:
    done = await asyncio.gather(sample(guest), sample(guest))
    assert {tuple(found[0].versions.tolist()) for found in done} == {(4, 4, 4)}
    first, second = script.labels
    assert first == "unknown"
    assert second.endswith(":4.2")
    assert len(script.staged) > 100_000
    assert script.file is not None
    assert not await asyncio.to_thread(script.file.exists)


async def test_a_guest_whose_first_weights_are_not_taken_asks_for_nothing(guest: ServedEngine, script: Script) -> None:
    script.stage_error = CorruptObjectError("digest")
    with pytest.raises(CorruptObjectError):
        await sample(guest)
    assert script.asked == []
    script.stage_error = None
    assert len(await sample(guest)) == 1


async def test_what_a_killed_actor_left_for_a_guest_goes_when_the_next_one_writes(
    guest: ServedEngine, script: Script, tiny_model: Path, tmp_path: Path
) -> None:
    await sample(guest)
    assert script.file is not None
    script.file.write_bytes(b"whole")
    tensors = the_tensors(tiny_model)
    another = served(script, Guest(key="", folder=tmp_path, first=lambda: tensors), tiny_model, tensors)
    await another.apply_weights(record(NEXT))
    await another.close()
    assert not await asyncio.to_thread(lambda: list(tmp_path.glob("*.safetensors")))


async def test_two_engines_on_one_server_find_each_other_out(
    engine: ServedEngine, guest: ServedEngine, script: Script
) -> None:
    await sample(engine)
    await sample(guest)
    script.changes = {"spans": ((script.labels[0], 0, 3),)}
    with pytest.raises(EngineLostError, match="does another run use it"):
        await sample(guest)
