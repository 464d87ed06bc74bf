"""What every rollout engine promises; a new engine joins with a ``Subject`` of its own in ``ENGINES``."""

import asyncio
import io
import itertools
import os
import signal
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pytest
import torch
from PIL import Image
from steadyhelm.data.types import (
    Completion,
    EngineRequest,
    FinishReason,
    ImageKey,
    PolicyVersion,
    PromptId,
    Sampling,
    WeightsRecord,
)
from steadyhelm.engines.process import EngineProcess
from steadyhelm.errors import (
    CorruptObjectError,
    DataError,
    DeadlineError,
    EngineLostError,
    FatalError,
    RetryableError,
)
from steadyhelm.models.batch import TokenSequence, collate
from steadyhelm.models.encoder import PromptEncoder
from steadyhelm.models.layout import ModelLayout
from steadyhelm.models.load import load_model
from steadyhelm.models.logprobs import completion_logprobs
from steadyhelm.services import RolloutEngine
from steadyhelm.services.rollout.served import Dialect, Guest, ServedEngine
from steadyhelm.services.rollout.sglang import SglangDialect
from steadyhelm.services.rollout.transformers import TransformersEngine
from steadyhelm.services.rollout.vllm import VllmDialect
from steadyhelm.store import ObjectStore, open_store
from steadyhelm.store.images import get_image, put_image
from steadyhelm.testing.fake_engine import TABLE, FakeEngine
from steadyhelm.weights import WeightSync
from steadyhelm.weights.broadcast import BroadcastWeights
from steadyhelm.weights.local import LocalWeights
from steadyhelm.weights.store import StoreWeights

FIRST = PolicyVersion(iteration=4, attempt=2)
TEXTS = ("Which digit is it?", "Is the digit odd or even? Say why.", "Is it larger than 4?", "x")


def picture(seed: int, height: int = 56, width: int = 56) -> bytes:
    noise = np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(noise).save(buffer, "PNG")
    return buffer.getvalue()


class Subject(Protocol):
    """An engine under test with what the suite needs to know about its policy."""

    engine: RolloutEngine
    eos_ids: tuple[int, ...]
    banned_ids: tuple[int, ...]
    corrupt: ImageKey

    def request(self, name: str, text: str, images: Sequence[int] = (), seed: int = 1) -> EngineRequest: ...

    def logprobs(
        self, version: int, request: EngineRequest, tokens: np.ndarray, temperature: float = 1.0
    ) -> np.ndarray:
        """What the trainer says of these tokens under the weights of ``version`` (an index into the weights made)."""
        ...

    def vision_mass(self, version: int, request: EngineRequest) -> float:
        """Probability that the policy without its token mask gives to banned tokens as the first one."""
        ...

    def record(self, version: PolicyVersion, *, favour: Sequence[int] = (), damage: str = "") -> WeightsRecord:
        """New weights: other random numbers, with ``favour`` tokens made very likely; broken as ``damage`` says."""
        ...


class TransformersSubject:
    def __init__(self, folder: Path, root: Path) -> None:
        self._store = open_store(str(root))
        self._folder = folder
        encoder = PromptEncoder(
            folder, min_pixels=3136, max_pixels=100352, fetch=lambda key: get_image(self._store, key)
        )
        model = load_model(folder, dtype="float32")
        self._encoder = encoder
        self._scorers = [load_model(folder, dtype="float32")]
        self._weights: WeightSync = StoreWeights(self._store)
        self.eos_ids, self.banned_ids = encoder.eos_ids, encoder.banned_ids
        self.corrupt = put_image(self._store, picture(9)[:200])
        self.engine = TransformersEngine(model, encoder, batch=8, version=FIRST, fetch=self._weights.fetch)

    def request(self, name: str, text: str, images: Sequence[int] = (), seed: int = 1) -> EngineRequest:
        keys = tuple(put_image(self._store, picture(n, 56, 56 + 28 * (n % 3))) for n in images)
        return EngineRequest(
            prompt_id=PromptId(name), prompt_tokens=self._encoder.encode(text, keys), images=keys, seed=seed
        )

    def logprobs(
        self, version: int, request: EngineRequest, tokens: np.ndarray, temperature: float = 1.0
    ) -> np.ndarray:
        row = TokenSequence(prompt_tokens=request.prompt_tokens, tokens=tokens, images=request.images)
        with torch.no_grad():
            found, _, _ = completion_logprobs(
                self._scorers[version],
                collate([row], self._encoder),
                temperature=temperature,
                banned_ids=self.banned_ids,
            )
        return found[0].numpy()

    def vision_mass(self, version: int, request: EngineRequest) -> float:
        first = [
            TokenSequence(prompt_tokens=request.prompt_tokens, tokens=np.asarray([8], np.int32), images=request.images)
        ]
        batch = collate(first, self._encoder)
        with torch.no_grad():
            model = self._scorers[version]
            states = model.model(
                input_ids=batch.input_ids,
                position_ids=batch.position_ids,
                pixel_values=batch.pixel_values,
                image_grid_thw=batch.image_grid_thw,
            ).last_hidden_state
            logits = model.lm_head(states[0, -2])
        return float(logits.softmax(-1)[list(self.banned_ids)].sum())

    def record(self, version: PolicyVersion, *, favour: Sequence[int] = (), damage: str = "") -> WeightsRecord:
        torch.manual_seed(version.iteration)
        model = load_model(self._folder, dtype="float32")
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.02)
            for token in favour:
                model.get_output_embeddings().weight[token] *= 300.0
        self._scorers.append(model)
        tensors = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        last = sorted(tensors)[-1]
        if damage == "missing":
            del tensors[last]
        elif damage == "extra":
            tensors["model.more"] = torch.zeros(3)
        elif damage == "shape":
            tensors[last] = tensors[last][:-1].clone()
        elif damage == "type":
            tensors[last] = tensors[last].bfloat16()
        record = self._weights.publish(version, f"run/weights/{version.iteration:06d}.{version.attempt}", tensors)
        if damage == "bytes":
            path = Path(self._store.uri.removeprefix("file://")) / record.objects[0].key
            data = bytearray(path.read_bytes())
            data[-1] ^= 1
            path.unlink()
            path.write_bytes(data)
        return record

    @contextmanager
    def weights_by(self, way: Callable[[ObjectStore], WeightSync]) -> Iterator[None]:
        """Within it ``record`` publishes this way, and the engine fetches so."""
        before, self._weights = self._weights, way(self._store)
        self.engine._fetch = self._weights.fetch
        try:
            yield
        finally:
            self._weights.close()
            self._weights = before
            self.engine._fetch = before.fetch


@dataclass(frozen=True)
class Lent:
    """A running engine server as an engine takes it that must not end it: one server serves all tests."""

    process: EngineProcess

    def __getattr__(self, name: str) -> Any:
        return getattr(self.process, name)

    def end(self) -> None: ...

    def close(self) -> None: ...


class ServedSubject(TransformersSubject):
    """A server that every test begins with the model folder's own weights, as version ``FIRST``."""

    def __init__(self, folder: Path, root: Path, server: EngineProcess, dialect: Dialect) -> None:
        super().__init__(folder, root)
        self.process = server
        self.engine = self._served(Lent(server), dialect, PolicyVersion(iteration=0, attempt=2))

    def _served(self, process: Lent | Guest, dialect: Dialect, version: PolicyVersion) -> ServedEngine:
        return ServedEngine(
            self.process.url,
            process=process,
            dialect=dialect,
            encoder=self._encoder,
            layout=ModelLayout(self._folder, dtype="float32"),
            version=version,
            fetch=self._weights.fetch,
            deadline_s=120.0,
        )

    def be_guest(self, dialect: Dialect, folder: Path) -> None:
        """From now on the engine is a guest of the server."""
        self.engine = self._served(
            Guest(key=self.process.key, folder=folder, first=self._scorers[0].state_dict), dialect, FIRST
        )

    def put(self, image: bytes) -> ImageKey:
        return put_image(self._store, image)

    def with_image(self, name: str, image: bytes) -> EngineRequest:
        keys = (self.put(image),)
        tokens = self._encoder.encode(TEXTS[0], keys)
        return EngineRequest(prompt_id=PromptId(name), prompt_tokens=tokens, images=keys, seed=3)

    async def begin(self) -> None:
        """By way of other weights, so that the first ones are a difference too."""
        tensors = dict(load_model(self._folder, dtype="float32").state_dict())
        for iteration, factor in ((FIRST.iteration - 1, 1.01), (FIRST.iteration, 1.0)):
            version = PolicyVersion(iteration=iteration, attempt=FIRST.attempt)
            scaled = {name: tensor * factor for name, tensor in tensors.items()}
            await self.engine.apply_weights(self._weights.publish(version, f"run/weights/{version}", scaled))


class FakeSubject:
    VOCABULARY = 40

    def __init__(self, folder: Path, root: Path) -> None:
        self._tables = [self._table(0)]
        self._published: dict[PolicyVersion, Mapping[str, Any]] = {}
        self._images: dict[ImageKey, bytes] = {ImageKey("images/bad"): b"no picture"}
        self.eos_ids, self.banned_ids, self.corrupt = (2,), (3, 4), ImageKey("images/bad")
        self.engine = self._make(self._tables[0], token_s=0.0)

    def _make(self, table: np.ndarray, token_s: float) -> FakeEngine:
        return FakeEngine(
            table,
            eos_id=2,
            banned_ids=self.banned_ids,
            version=FIRST,
            fetch=self._fetch,
            fetch_image=self._images.__getitem__,
            token_s=token_s,
        )

    def _table(self, seed: int) -> np.ndarray:
        return np.random.default_rng(seed).normal(size=(self.VOCABULARY, self.VOCABULARY)).astype(np.float32)

    def _fetch(self, record: WeightsRecord) -> Mapping[str, Any]:
        if record.checksum == "bytes":
            raise CorruptObjectError("the checksum of the table does not match")
        return self._published[record.version]

    def request(self, name: str, text: str, images: Sequence[int] = (), seed: int = 1) -> EngineRequest:
        keys = tuple(ImageKey(f"images/{n}") for n in images)
        self._images |= {key: picture(n) for key, n in zip(keys, images, strict=True)}
        tokens = np.frombuffer(text.encode(), np.uint8).astype(np.int32) % self.VOCABULARY
        return EngineRequest(prompt_id=PromptId(name), prompt_tokens=tokens, images=keys, seed=seed)

    def logprobs(
        self, version: int, request: EngineRequest, tokens: np.ndarray, temperature: float = 1.0
    ) -> np.ndarray:
        return self._make(self._tables[version], 0.0).logprobs(request, tokens, temperature)

    def vision_mass(self, version: int, request: EngineRequest) -> float:
        mass = np.exp(self._tables[version][request.prompt_tokens[-1]].astype(float))
        return float(mass[list(self.banned_ids)].sum() / mass.sum())

    def record(self, version: PolicyVersion, *, favour: Sequence[int] = (), damage: str = "") -> WeightsRecord:
        table = self._table(version.iteration)
        table[:, list(favour)] = 50.0
        self._tables.append(table)
        if damage == "missing":
            self._published[version] = {}
        elif damage == "extra":
            self._published[version] = {TABLE: table, "more": table}
        elif damage in ("shape", "type"):
            self._published[version] = {TABLE: table[:-1]}
        else:
            self._published[version] = {TABLE: table}
        return WeightsRecord(version=version, objects=(), checksum=damage)


ENGINES = {"transformers": TransformersSubject, "fake": FakeSubject}
SERVED = {"vllm": VllmDialect, "sglang": SglangDialect}


@pytest.fixture(params=[*sorted(ENGINES), *(pytest.param(name, marks=pytest.mark.engines) for name in SERVED)])
async def subject(request: pytest.FixtureRequest, tiny_model: Path, tmp_path: Path) -> AsyncIterator[Subject]:
    if request.param in ENGINES:
        made = ENGINES[request.param](tiny_model, tmp_path / "store")
    else:
        server = request.getfixturevalue(f"{request.param}_server")
        made = ServedSubject(tiny_model, tmp_path / "store", server, SERVED[request.param]())
        await made.begin()
    yield made
    await made.engine.close()


async def answers(
    subject: Subject, requests: Sequence[EngineRequest], sampling: Sampling | None = None
) -> dict[str, Completion]:
    sampling = sampling or Sampling(max_new_tokens=24)
    done = [completion async for completion in subject.engine.generate(requests, sampling)]
    assert len(done) == len({completion.prompt_id for completion in done}) == len(requests)
    return {completion.prompt_id: completion for completion in done}


def several(subject: Subject, number: int = 12) -> list[EngineRequest]:
    return [
        subject.request(f"0:{n}", TEXTS[n % len(TEXTS)], images=range(n % 3), seed=7919 * n + 1) for n in range(number)
    ]


async def test_every_request_is_answered_once_with_tokens_logprobs_and_versions_of_one_length(subject: Subject) -> None:
    requests = several(subject)
    found = await answers(subject, requests)
    assert set(found) == {request.prompt_id for request in requests}
    for completion in found.values():
        assert completion.tokens.dtype == completion.versions.dtype == np.int32
        assert completion.logprobs.dtype == np.float32
        assert 1 <= len(completion.tokens) == len(completion.logprobs) == len(completion.versions) <= 24
        assert set(completion.versions.tolist()) == {4}
        assert completion.attempt == 2


async def test_more_prompts_and_images_than_are_read_at_a_time_are_answered_as_any_others(subject: Subject) -> None:
    requests = [subject.request(f"0:{n}", TEXTS[n % len(TEXTS)], images=(n,) * 8, seed=n) for n in range(120)]
    read = sum(len(request.prompt_tokens) for request in requests)
    assert read > 8192 or isinstance(subject, FakeSubject)  # whose images take no tokens
    found = await answers(subject, requests, Sampling(max_new_tokens=4))
    for request in requests[::40]:
        completion = found[request.prompt_id]
        expected = subject.logprobs(0, request, completion.tokens)
        np.testing.assert_allclose(completion.logprobs, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("temperature", [1.0, 0.6])
async def test_logprobs_are_the_trainers_at_the_runs_temperature_images_included(
    subject: Subject, temperature: float
) -> None:
    requests = several(subject)
    found = await answers(subject, requests, Sampling(max_new_tokens=24, temperature=temperature))
    for request in requests:
        completion = found[request.prompt_id]
        expected = subject.logprobs(0, request, completion.tokens, temperature)
        np.testing.assert_allclose(completion.logprobs, expected, rtol=0, atol=1e-4)


async def test_swapping_two_images_changes_the_logprobs(subject: Subject) -> None:
    one = subject.request("0:0", TEXTS[0], images=(3, 6))  # equal sizes, so that the tokens are the same
    two = subject.request("0:0", TEXTS[0], images=(6, 3))
    np.testing.assert_array_equal(one.prompt_tokens, two.prompt_tokens)
    tokens = (await answers(subject, [one]))["0:0"].tokens
    assert np.abs(subject.logprobs(0, one, tokens) - subject.logprobs(0, two, tokens)).max() > 1e-3
    greedy = Sampling(max_new_tokens=4, greedy=True)
    first, second = (await answers(subject, [one], greedy))["0:0"], (await answers(subject, [two], greedy))["0:0"]
    assert first.logprobs[0] != second.logprobs[0]


async def test_greedy_answers_are_the_most_likely_tokens_and_do_not_depend_on_the_seed(subject: Subject) -> None:
    sampling = Sampling(max_new_tokens=12, temperature=0.3, greedy=True)
    one = subject.request("0:0", TEXTS[0], images=(1,), seed=1)
    two = subject.request("0:0", TEXTS[0], images=(1,), seed=2)
    first, second = (await answers(subject, [one], sampling))["0:0"], (await answers(subject, [two], sampling))["0:0"]
    np.testing.assert_array_equal(first.tokens, second.tokens)
    np.testing.assert_allclose(first.logprobs, subject.logprobs(0, one, first.tokens, 1.0), rtol=0, atol=1e-4)
    others = [token for token in range(8, 30) if token != first.tokens[0]]
    rivals = [subject.logprobs(0, one, np.asarray([token], np.int32))[0] for token in others]
    assert first.logprobs[0] >= max(rivals)


async def test_a_request_gets_the_same_answer_alone_and_in_any_batch(subject: Subject) -> None:
    requests = several(subject)
    together = await answers(subject, requests)
    reversed_ = await answers(subject, requests[::-1])
    alone = await answers(subject, [requests[5]])
    for request in requests:
        np.testing.assert_array_equal(together[request.prompt_id].tokens, reversed_[request.prompt_id].tokens)
    np.testing.assert_array_equal(together["0:5"].tokens, alone["0:5"].tokens)
    np.testing.assert_allclose(together["0:5"].logprobs, alone["0:5"].logprobs, rtol=0, atol=1e-4)


async def test_samples_of_one_prompt_differ_by_seed_and_each_equals_its_own_request(subject: Subject) -> None:
    requests = [subject.request(f"0:0s{n}", TEXTS[1], images=(2,), seed=1000 + n) for n in range(6)]
    found = await answers(subject, requests)
    assert len({completion.tokens.tobytes() for completion in found.values()}) == 6
    for request in requests:
        expected = subject.logprobs(0, request, found[request.prompt_id].tokens)
        np.testing.assert_allclose(found[request.prompt_id].logprobs, expected, rtol=0, atol=1e-4)


async def test_truncation_is_marked_and_gets_no_end_token(subject: Subject) -> None:
    found = await answers(subject, several(subject, 16), Sampling(max_new_tokens=200))
    short = await answers(subject, several(subject, 16), Sampling(max_new_tokens=3))
    finishes = set()
    for completion in [*found.values(), *short.values()]:
        ended = int(completion.tokens[-1]) in subject.eos_ids
        assert (completion.finish is FinishReason.STOP) == ended
        assert not set(completion.tokens[:-1].tolist()) & set(subject.eos_ids)
        finishes.add(completion.finish)
    assert finishes == {FinishReason.STOP, FinishReason.LENGTH}
    cut = next(completion for completion in short.values() if completion.finish is FinishReason.LENGTH)
    assert len(cut.tokens) == 3
    np.testing.assert_array_equal(cut.tokens, found[cut.prompt_id].tokens[:3])


async def test_vision_tokens_are_never_sampled_even_where_the_policy_wants_them(subject: Subject) -> None:
    await subject.engine.apply_weights(subject.record(PolicyVersion(iteration=5, attempt=2), favour=subject.banned_ids))
    requests = several(subject)
    assert np.mean([subject.vision_mass(1, request) for request in requests]) > 0.5
    found = await answers(subject, requests)
    for request in requests:
        completion = found[request.prompt_id]
        assert not set(completion.tokens.tolist()) & set(subject.banned_ids)
        expected = subject.logprobs(1, request, completion.tokens)
        np.testing.assert_allclose(completion.logprobs, expected, rtol=0, atol=1e-4)


async def test_new_weights_change_the_answers_and_stamp_their_version(subject: Subject) -> None:
    requests = several(subject, 4)
    before = await answers(subject, requests)
    version = PolicyVersion(iteration=5, attempt=2)
    await subject.engine.apply_weights(subject.record(version))
    assert subject.engine.version == version
    after = await answers(subject, requests)
    assert any(before[name].tokens.tobytes() != after[name].tokens.tobytes() for name in before)
    for request in requests:
        completion = after[request.prompt_id]
        assert set(completion.versions.tolist()) == {5}
        expected = subject.logprobs(1, request, completion.tokens)
        np.testing.assert_allclose(completion.logprobs, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("damage", ["missing", "extra", "shape", "type", "bytes"])
async def test_weights_that_do_not_fit_are_refused_and_the_old_ones_go_on_serving(
    subject: Subject, damage: str
) -> None:
    requests = several(subject, 4)
    before = await answers(subject, requests)
    with pytest.raises(FatalError, match=r"weights|object|checksum"):
        await subject.engine.apply_weights(subject.record(PolicyVersion(iteration=5, attempt=2), damage=damage))
    assert subject.engine.version == FIRST
    after = await answers(subject, requests)
    for name, completion in before.items():
        np.testing.assert_array_equal(completion.tokens, after[name].tokens)
        # Not to the last bit: a server batches as it likes.
        np.testing.assert_allclose(completion.logprobs, after[name].logprobs, rtol=0, atol=1e-5)


async def across(
    subject: Subject, record: WeightsRecord, ask: Callable[[str, int], EngineRequest]
) -> tuple[list[Completion], list[RetryableError]]:
    """What two streams of requests end with while weights come in flight: each asks again until they are there."""
    swap: asyncio.Task[None] | None = None
    done: list[Completion] = []
    sent_back: list[RetryableError] = []

    async def stream(name: int) -> None:
        nonlocal swap
        for turn in itertools.count():
            requests = [ask(f"{name}:{8 * turn + n}", 8 * (2 * turn + name) + n) for n in range(8)]
            try:
                async for completion in subject.engine.generate(requests, Sampling(max_new_tokens=600)):
                    done.append(completion)
                    swap = swap or asyncio.create_task(subject.engine.apply_weights(record))
            except RetryableError as error:
                sent_back.append(error)
            if swap and swap.done():
                return

    await asyncio.gather(stream(0), stream(1))
    assert swap is not None
    await swap
    assert subject.engine.version == record.version
    return done, sent_back


async def test_weights_that_come_in_flight_serve_from_the_next_token_on(subject: Subject) -> None:
    record = subject.record(PolicyVersion(iteration=5, attempt=2))
    requests: dict[str, EngineRequest] = {}

    def ask(name: str, n: int) -> EngineRequest:
        return requests.setdefault(name, subject.request(name, TEXTS[n % 4], images=(n % 8,), seed=n))

    done, sent_back = await across(subject, record, ask)
    assert not sent_back
    assert {completion.prompt_id for completion in done} == set(requests)
    assert all(set(completion.versions.tolist()) <= {4, 5} for completion in done)
    assert all((np.diff(completion.versions) >= 0).all() for completion in done)
    both = [completion for completion in done if {4, 5} == set(completion.versions.tolist())]
    assert both, [int((completion.versions == 4).sum()) for completion in done]
    for completion in both:
        old = int((completion.versions == 4).sum())
        expected = subject.logprobs(0, requests[completion.prompt_id], completion.tokens)
        np.testing.assert_allclose(completion.logprobs[:old], expected[:old], rtol=0, atol=1e-4)
        assert np.abs(completion.logprobs[old:] - expected[old:]).max() > 1e-3


async def test_weights_of_another_attempt_in_flight_send_the_requests_back(subject: Subject) -> None:
    record = subject.record(PolicyVersion(iteration=5, attempt=3))
    done, sent_back = await across(subject, record, lambda name, n: subject.request(name, TEXTS[0], seed=n))
    assert sent_back, [(completion.prompt_id, len(completion.tokens), completion.attempt) for completion in done]
    assert all("attempt" in str(error) for error in sent_back)
    for completion in done:
        assert (completion.attempt, set(completion.versions.tolist())) in [(2, {4}), (3, {5})]


async def test_a_corrupt_image_is_an_error_of_its_request_and_the_engine_goes_on(subject: Subject) -> None:
    good = subject.request("0:0", TEXTS[0], images=(1,))
    bad = EngineRequest(prompt_id=PromptId("0:1"), prompt_tokens=good.prompt_tokens, images=(subject.corrupt,), seed=1)
    with pytest.raises(DataError, match=subject.corrupt):
        await answers(subject, [good, bad])
    assert set(await answers(subject, [good])) == {"0:0"}


async def test_the_event_loop_answers_health_while_the_engine_generates(subject: Subject) -> None:
    work = asyncio.create_task(answers(subject, several(subject, 8), Sampling(max_new_tokens=300)))
    answered = 0
    while not work.done():
        await subject.engine.health()
        answered += 1
        await asyncio.sleep(0.001)
    assert answered >= 3
    await work


async def test_a_closed_iterator_ends_the_work(subject: Subject) -> None:
    stream = subject.engine.generate(several(subject, 8), Sampling(max_new_tokens=600))
    await anext(stream)
    await stream.aclose()
    await subject.engine.health()
    await subject.engine.drain(1.0)


async def test_a_draining_engine_finishes_what_it_has_and_takes_nothing_new(subject: Subject) -> None:
    stream = subject.engine.generate(several(subject, 4), Sampling(max_new_tokens=30))
    done = [await anext(stream)]
    with pytest.raises(DeadlineError, match="in flight"):
        await subject.engine.drain(0.0)
    with pytest.raises(EngineLostError, match="draining"):
        await answers(subject, several(subject, 1))
    done += [completion async for completion in stream]
    assert len(done) == 4
    await subject.engine.drain(1.0)


@pytest.fixture(params=[pytest.param(name, marks=pytest.mark.engines) for name in SERVED])
async def served(request: pytest.FixtureRequest, tiny_model: Path, tmp_path: Path) -> AsyncIterator[ServedSubject]:
    server = request.getfixturevalue(f"{request.param}_server")
    made = ServedSubject(tiny_model, tmp_path / "store", server, SERVED[request.param]())
    await made.begin()
    yield made
    await made.engine.close()


def photograph(mode: str, size: tuple[int, int], turned: bool) -> bytes:
    """A picture that cannot be taken as it is: of an odd size, with another mode than RGB, or lying on its side."""
    noise = np.random.default_rng(5).integers(0, 255, (size[1], size[0], 4), dtype=np.uint8)
    picture = Image.fromarray(noise, "RGBA").convert(mode)
    exif = picture.getexif()
    if turned:
        exif[0x0112] = 6
    buffer = io.BytesIO()
    picture.save(buffer, "PNG", exif=exif)
    return buffer.getvalue()


async def test_a_server_sees_images_of_any_size_mode_and_orientation_as_the_trainer_does(served: ServedSubject) -> None:
    kinds = [("RGB", (70, 95), False), ("RGB", (500, 300), False), ("RGBA", (61, 59), False), ("L", (33, 81), True)]
    requests = [served.with_image(f"0:{n}", photograph(*kind)) for n, kind in enumerate(kinds)]
    found = await answers(served, requests)
    for request in requests:
        completion = found[request.prompt_id]
        expected = served.logprobs(0, request, completion.tokens)
        np.testing.assert_allclose(completion.logprobs, expected, rtol=0, atol=1e-4)


async def test_a_server_samples_behind_an_update_in_flight_as_if_the_new_weights_had_read_it_all(
    served: ServedSubject,
) -> None:
    requests: dict[str, EngineRequest] = {}

    def ask(name: str, n: int) -> EngineRequest:
        return requests.setdefault(name, served.request(name, TEXTS[n % 4], images=(n % 8,), seed=n))

    done, _ = await across(served, served.record(PolicyVersion(iteration=5, attempt=2)), ask)
    crossed = [completion for completion in done if set(completion.versions.tolist()) == {4, 5}]
    assert crossed, [(completion.prompt_id, set(completion.versions.tolist())) for completion in done]
    for completion in crossed:
        old = int((completion.versions == 4).sum())
        for version, part in ((0, slice(0, old)), (1, slice(old, None))):
            expected = served.logprobs(version, requests[completion.prompt_id], completion.tokens)
            np.testing.assert_allclose(completion.logprobs[part], expected[part], rtol=0, atol=1e-4)


REAL = ["transformers", *(pytest.param(name, marks=pytest.mark.engines) for name in SERVED)]


@pytest.mark.parametrize("way", [LocalWeights, BroadcastWeights])
@pytest.mark.parametrize("subject", REAL, indirect=True)
async def test_weights_that_come_by_shared_memory_or_by_broadcast_are_the_trainers_too(
    subject: TransformersSubject, way: type[LocalWeights | BroadcastWeights]
) -> None:
    with subject.weights_by(way):
        requests = several(subject, 4)
        await answers(subject, requests)
        for index, iteration in enumerate((5, 6), 1):
            await subject.engine.apply_weights(subject.record(PolicyVersion(iteration=iteration, attempt=2)))
            found = await answers(subject, requests)  # of the same images
            for request in requests:
                completion = found[request.prompt_id]
                assert set(completion.versions.tolist()) == {iteration}
                expected = subject.logprobs(index, request, completion.tokens)
                np.testing.assert_allclose(completion.logprobs, expected, rtol=0, atol=1e-4)


async def test_the_same_id_asked_for_again_gets_the_same_answer(served: ServedSubject) -> None:
    request = served.request("0:0", TEXTS[1], images=(2,), seed=77)
    twice = await asyncio.gather(answers(served, [request]), answers(served, [request]))
    later = await answers(served, [request])
    for found in (*twice, later):
        np.testing.assert_array_equal(found["0:0"].tokens, later["0:0"].tokens)
        np.testing.assert_allclose(found["0:0"].logprobs, later["0:0"].logprobs, rtol=0, atol=1e-4)


async def test_a_request_that_the_server_refuses_is_an_error_of_its_data(served: ServedSubject) -> None:
    good = served.request("0:0", TEXTS[0])
    with pytest.raises(DataError, match="refuses"):
        await answers(served, [replace(good, prompt_tokens=np.full(2000, 20, np.int32))])
    with pytest.raises(DataError, match=r"leaves the server room|refuses"):
        await answers(served, [replace(good, prompt_tokens=np.full(1010, 20, np.int32))])
    blind = replace(good, images=(served.put(picture(1)),))
    with pytest.raises(DataError, match="image tokens"):
        await answers(served, [blind])
    assert set(await answers(served, [good])) == {"0:0"}


async def test_orders_share_the_server_and_none_waits_for_another_to_end(served: ServedSubject) -> None:
    overtaken = False
    for _ in range(5):  # on a busy machine the long order may be at its end before the short one is sent
        long = asyncio.create_task(answers(served, several(served, 6), Sampling(max_new_tokens=600)))
        await asyncio.sleep(0.3)
        short = await answers(served, several(served, 2), Sampling(max_new_tokens=2))
        assert len(short) == 2
        overtaken = overtaken or not long.done()
        await long
        if overtaken:
            break
    assert overtaken


@pytest.mark.engines
async def test_sglang_with_our_plug_in_draws_what_our_own_engine_draws(
    sglang_server: EngineProcess, tiny_model: Path, tmp_path: Path
) -> None:
    theirs = ServedSubject(tiny_model, tmp_path / "store", sglang_server, SglangDialect())
    await theirs.begin()
    ours = TransformersSubject(tiny_model, tmp_path / "store")
    requests = several(theirs)
    greedy = asyncio.create_task(answers(theirs, requests[:3], Sampling(max_new_tokens=200, greedy=True)))
    found, expected = await answers(theirs, requests), await answers(ours, requests)
    await greedy  # requests of another kind in the same batches change nothing
    same = [bool(np.array_equal(found[name].tokens, expected[name].tokens)) for name in expected]
    assert sum(same) >= len(same) - 1  # a uniform may fall on the last bit of a probability
    await theirs.engine.close()


async def test_a_server_that_somebody_else_runs_gets_our_weights_and_answers_with_them(
    served: ServedSubject, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    await served.engine.apply_weights(served.record(PolicyVersion(iteration=9, attempt=2)))  # somebody else's
    old, dialect = served.engine, SERVED[request.node.callspec.params["served"]]()
    (tmp_path / "shared").mkdir()
    served.be_guest(dialect, tmp_path / "shared")
    requests = several(served, 4)
    found = await answers(served, requests)
    await served.engine.apply_weights(served.record(PolicyVersion(iteration=5, attempt=2)))
    later = await answers(served, requests)
    for request_ in requests:
        for version, done in ((0, found[request_.prompt_id]), (2, later[request_.prompt_id])):
            assert set(done.versions.tolist()) == {5 if version else 4}
            expected = served.logprobs(version, request_, done.tokens)
            np.testing.assert_allclose(done.logprobs, expected, rtol=0, atol=1e-4)
    assert list((tmp_path / "shared").iterdir()) == []
    with pytest.raises(EngineLostError, match="does another run use it"):
        await anext(old.generate(requests, Sampling(max_new_tokens=2)))
    await old.close()


async def test_a_killed_server_is_noticed_and_its_requests_come_back_to_be_tried_again(served: ServedSubject) -> None:
    work = asyncio.create_task(answers(served, several(served, 6), Sampling(max_new_tokens=900)))
    await asyncio.sleep(0.5)
    os.kill(served.process.pid, signal.SIGKILL)
    with pytest.raises(EngineLostError, match=r"process ended|does not answer"):
        await asyncio.wait_for(work, 5)
    with pytest.raises(EngineLostError):
        await served.engine.health()
    with pytest.raises(EngineLostError):
        await served.engine.apply_weights(served.record(PolicyVersion(iteration=6, attempt=2)))
