"""The rollout engine behind a server: what is the same for every server that speaks HTTP.

Requests go to the server as they come, each on its own, so that it batches them as it likes; an order is no barrier.
New weights are fetched, checked and read by the server while it goes on serving. Only the swap pauses it: requests in
flight are held, their keys and values are computed anew from the new weights, and their later tokens carry the new
version. A swap that fails leaves weights that nobody can name, so the server is given up.
"""

from __future__ import annotations

import asyncio
import base64
import secrets
from collections.abc import AsyncGenerator, Callable, Coroutine, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
import xxhash

from steadyhelm import telemetry
from steadyhelm.data.types import (
    Completion,
    EngineRequest,
    FinishReason,
    ImageKey,
    PolicyVersion,
    Sampling,
    WeightsRecord,
)
from steadyhelm.engines.http import EngineServer
from steadyhelm.engines.process import EngineProcess
from steadyhelm.errors import (
    DataError,
    DeadlineError,
    EngineLostError,
    NonFiniteError,
    ResourceError,
    RetryableError,
    SteadyhelmError,
)
from steadyhelm.models.encoder import PromptEncoder
from steadyhelm.models.layout import ModelLayout
from steadyhelm.services.rollout.settled import settled
from steadyhelm.weights.codec import encode
from steadyhelm.weights.local import MappedTensors

T = TypeVar("T")

WeightsFetch = Callable[[WeightsRecord], Mapping[str, torch.Tensor]]
"""Reads and verifies a version's tensors; raises CorruptObjectError."""

LOST_LOGPROB = -9000.0
"""Servers send −9999 in place of a log-prob that is not a number or infinite."""
EXCLUDED = -1.0e30
"""Logit bias of tokens that are not sampled: exp of it is 0 in every float type, and JSON has no −∞."""
FINISH: Mapping[str, FinishReason] = {"stop": FinishReason.STOP, "length": FinishReason.LENGTH}
"""What servers call the ends of completions; any other is an abort."""
KEPT_IMAGES = 256
"""Images whose encoded form is kept: those of the prompts that are sampled at one time."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerSpec:
    """What a server is started with.

    ``python`` is the interpreter of the server's own environment, ``folder`` the model folder, ``device`` ``"cpu"`` or
    ``"cuda"``, ``max_tokens`` the longest prompt and completion together, ``parts`` how many devices the model is cut
    over; ``args`` and ``environment`` are the run file's, on top of what we set.

    Example: ``ServerSpec(python="python3", folder="runs/digits-sft/model", dtype="float32", device="cpu",
    max_tokens=104, min_pixels=3136, max_pixels=100352, sees_images=True)``
    """

    python: str
    folder: str
    dtype: str
    device: str
    max_tokens: int
    min_pixels: int
    max_pixels: int
    sees_images: bool
    trust_remote_code: bool = False
    parts: int = 1
    args: tuple[str, ...] = ()
    environment: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Ask:
    """A request in a server's terms.

    ``tokens`` has one image placeholder for each image, which the server expands. ``images`` are data URLs, in the
    prompt's order, by their keys. ``banned_ids`` have probability 0; ``eos_ids`` end the completion.
    """

    name: str
    tokens: list[int]
    images: tuple[tuple[ImageKey, str], ...]
    expanded: int
    seed: int
    sampling: Sampling
    banned_ids: tuple[int, ...]
    eos_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What a server answered: ``spans`` are (weight version, its first token, one behind its last)."""

    tokens: list[int]
    logprobs: list[float]
    spans: tuple[tuple[str, int, int], ...]
    finish: FinishReason
    prompt_length: int


class Dialect(Protocol):
    """How one kind of server is spoken to; errors are those of ``EngineServer``.

    ``label`` is what the server calls weights in its answers.
    """

    async def name_weights(self, server: EngineServer, label: str) -> None:
        """Says what the weights are called that the server was started with. Raises ConfigError without our plug-in."""
        ...

    async def complete(self, server: EngineServer, ask: Ask, deadline_s: float) -> Answer:
        """One completion."""
        ...

    async def stage(self, server: EngineServer, file: Path, digest: str) -> None:
        """Has the server read and verify a safetensors file while it serves. Raises CorruptObjectError."""
        ...

    async def swap(self, server: EngineServer, file: Path, digest: str, label: str, *, abort: bool) -> None:
        """Puts the staged weights in place, caches emptied; requests in flight go on with them, or are aborted."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Guest:
    """What it takes to use a server that somebody else runs.

    ``key`` is its bearer token, empty for none. ``folder`` is one that both sides see under this path. ``first`` reads
    the weights that are to be served first: nobody knows which ones the server has.

    Example: ``Guest(key="", folder=Path("/mnt/weights"), first=lambda: model.state_dict())``
    """

    key: str
    folder: Path
    first: Callable[[], Mapping[str, torch.Tensor]]


class ServedEngine:
    """A ``RolloutEngine`` over one server, which serves nobody else's weights meanwhile.

    Args:
        url: the server's.
        process: its process, or what it takes to be its guest.
        dialect: how it is spoken to.
        encoder: of the server's model folder.
        layout: of the same.
        version: whose weights it serves at first: those that it was started with, or those that the guest brings.
        fetch: reads a version's tensors.
        deadline_s: longest time for one completion.
    """

    def __init__(
        self,
        url: str,
        *,
        process: EngineProcess | Guest,
        dialect: Dialect,
        encoder: PromptEncoder,
        layout: ModelLayout,
        version: PolicyVersion,
        fetch: WeightsFetch,
        deadline_s: float,
    ) -> None:
        self._guest = process if isinstance(process, Guest) else None
        self._process = None if isinstance(process, Guest) else process
        self._folder = process.folder if isinstance(process, Guest) else process.scratch
        self._dialect = dialect
        self._encoder = encoder
        self._layout = layout
        self._version = version
        self._fetch = fetch
        self._deadline_s = deadline_s
        self._mark = secrets.token_hex(4)  # in our labels only: whoever else swaps weights in is found out
        # What an actor leaves that is killed, the next one for the same server finds.
        self._prefix = f"steadyhelm-{xxhash.xxh3_64_hexdigest(url.encode())}-"
        ended = None if self._process is None else self._process.ended
        log = None if self._process is None else self._process.tail
        self._server = EngineServer(url, key=process.key, ended=ended, log=log, on_lost=self._interrupt)
        self._calls: set[asyncio.Task[Any]] = set()
        self._why: SteadyhelmError | None = None  # of the last interruption
        self._begun = asyncio.Lock()
        self._is_named = False
        self._applying = asyncio.Lock()
        self._open = asyncio.Event()  # cleared while weights of another attempt are swapped in
        self._open.set()
        self._in_flight = 0
        self._idle = asyncio.Event()
        self._idle.set()
        self._draining = False
        self._image = lru_cache(KEPT_IMAGES)(self._data_url)

    @property
    def version(self) -> PolicyVersion:
        """The policy version whose weights the next token is sampled from."""
        return self._version

    async def generate(self, requests: Sequence[EngineRequest], sampling: Sampling) -> AsyncGenerator[Completion, None]:
        """Completions as they finish, in any order; closing the iterator aborts the rest.

        Raises:
            EngineLostError: the server is gone, or the engine is drained or closed.
            RetryableError: weights of another attempt came while the requests were in flight.
            DataError: an image is corrupt, a prompt does not match its images, or the server refuses a request.
            NonFiniteError: the policy's log-probs are not finite.
        """
        if self._draining:
            raise EngineLostError("the rollout engine is draining and takes no new requests: send them to another")
        self._in_flight += 1
        self._idle.clear()
        finished: asyncio.Queue[asyncio.Task[Completion]] = asyncio.Queue()
        calls: list[asyncio.Task[Completion]] = []
        try:
            await self._name_weights()
            calls = [self._call(self._complete(request, sampling)) for request in requests]
            for call in calls:
                call.add_done_callback(finished.put_nowait)
            served = asyncio.create_task(_timed(calls))
            for _ in calls:
                call = await finished.get()
                if call.cancelled():
                    assert self._why is not None
                    raise self._why
                yield call.result()
            await served
        finally:
            for call in calls:
                call.cancel()
            await asyncio.gather(*calls, return_exceptions=True)
            self._in_flight -= 1
            if not self._in_flight:
                self._idle.set()

    async def apply_weights(self, weights: WeightsRecord) -> None:
        """Serves ``weights`` from the next token on; nothing of them is applied before all of them are verified.

        Raises:
            CorruptObjectError: an object, the set or the server's copy does not match its checksum.
            ModelError: names, shapes or types are not this model's.
            ResourceError: the folder that the server reads them from takes no copy.
            EngineLostError: the server is gone, or failed in the middle of the swap and was given up.
        """
        async with self._applying:
            if weights.version == self._version:
                return
            await self._name_weights()
            await self._take(lambda: self._fetch(weights), weights.version)

    async def health(self) -> None:
        """Returns where the server answers that it can serve. Raises EngineLostError."""
        await self._server.health()

    async def drain(self, deadline_s: float) -> None:
        """Takes no new requests and returns once those in flight are done. Raises DeadlineError."""
        self._draining = True
        try:
            await asyncio.wait_for(self._idle.wait(), deadline_s)
        except TimeoutError as error:
            raise DeadlineError(
                f"the server's rollout engine has {self._in_flight} calls in flight after {deadline_s} s of draining: "
                "give it longer, or end it and send its requests to another"
            ) from error

    async def close(self) -> None:
        """Ends the server where it is ours; whatever is in flight is lost."""
        self._draining = True
        self._interrupt(EngineLostError("the rollout engine was closed"))
        await self._server.close()
        if self._process is not None:
            await asyncio.to_thread(self._process.close)

    async def _name_weights(self) -> None:
        """Before the first request: what the server calls its weights, which a guest brings along."""
        async with self._begun:
            if self._is_named:
                return
            known = self._guest is None
            await self._dialect.name_weights(self._server, self._label(self._version) if known else "unknown")
            if self._guest is not None:
                await self._take(self._guest.first, self._version)
            self._is_named = True

    def _label(self, version: PolicyVersion) -> str:
        return f"{self._mark}:{version}"

    async def _take(self, read: Callable[[], Mapping[str, torch.Tensor]], version: PolicyVersion) -> None:
        """Has the server take what ``read`` returns as ``version``; see ``apply_weights`` for the errors."""
        if self._server.lost is not None:
            raise self._server.lost
        file = self._folder / f"{self._prefix}{version}.safetensors"
        try:
            digest = await settled(asyncio.to_thread(self._write, read, version, file))
            with telemetry.span("rollout", "stage weights"):
                await self._dialect.stage(self._server, file, digest)
            with telemetry.span("rollout", "swap weights"):
                await self._swap(file, digest, version)
        except FileNotFoundError as error:  # the folder goes with the server
            raise self._server.lose(f"its folder for weights is gone ({error})") from error
        finally:
            with suppress(OSError):  # what cannot go now goes before the next is written
                file.unlink()

    async def _complete(self, request: EngineRequest, sampling: Sampling) -> Completion:
        ask = await asyncio.to_thread(self._ask, request, sampling)
        await self._open.wait()
        oldest = self._version
        answer = await self._dialect.complete(self._server, ask, self._deadline_s)
        if answer.finish is FinishReason.LENGTH and len(answer.tokens) < sampling.max_new_tokens:
            raise DataError(
                f"prompt {request.prompt_id!r} with {len(request.prompt_tokens)} tokens leaves the server room for "
                f"{len(answer.tokens)} of {sampling.max_new_tokens} more: raise data.max_prompt_tokens or lower "
                "rollout.max_new_tokens"
            )
        return self._completion(request, answer, oldest)

    def _ask(self, request: EngineRequest, sampling: Sampling) -> Ask:
        """Raises DataError where the request's image tokens are not what its images take."""
        tokens, image_id = request.prompt_tokens, self._encoder.image_id
        if not len(tokens) or int(tokens.min()) < 0 or int(tokens.max()) >= self._encoder.vocab_size:
            raise DataError(
                f"prompt {request.prompt_id!r} is empty or has a token outside the vocabulary of "
                f"{self._encoder.vocab_size}: encode it with the engine's model folder"
            )
        counts = [self._encoder.image_tokens(key) for key in request.images]
        places = np.flatnonzero(tokens == image_id) if image_id is not None else np.zeros(0, np.int64)
        if len(places) != sum(counts):
            raise DataError(
                f"prompt {request.prompt_id!r} has {len(places)} image tokens for {len(counts)} images that take "
                f"{sum(counts)}: encode it with the engine's model folder and limits of pixels"
            )
        firsts = places[np.cumsum([0, *counts[:-1]])] if counts else places
        kept = np.setdiff1d(np.arange(len(tokens)), np.setdiff1d(places, firsts))
        return Ask(
            name=request.prompt_id,
            tokens=tokens[kept].tolist(),
            images=tuple((key, self._image(key)) for key in request.images),
            expanded=len(tokens),
            seed=request.seed,
            sampling=sampling,
            banned_ids=self._encoder.banned_ids,
            eos_ids=self._encoder.eos_ids,
        )

    def _data_url(self, key: ImageKey) -> str:
        return "data:image/png;base64," + base64.b64encode(self._encoder.picture(key)).decode("ascii")

    def _completion(self, request: EngineRequest, answer: Answer, oldest: PolicyVersion) -> Completion:
        """The answer as a completion, unless its weights or numbers are not what they must be."""
        name = request.prompt_id
        if answer.prompt_length != len(request.prompt_tokens):
            raise DataError(
                f"prompt {name!r} has {len(request.prompt_tokens)} tokens but the server sees {answer.prompt_length}: "
                "its image processor has other limits; start it with data.min_pixels and data.max_pixels"
            )
        if answer.finish is FinishReason.ABORT or not answer.tokens:
            raise RetryableError(f"the server aborted prompt {name!r}: it is sampled anew")
        low = min(answer.logprobs)
        if not (np.isfinite(answer.logprobs).all() and low > LOST_LOGPROB):
            raise NonFiniteError(
                f"policy {self._version} gives prompt {name!r} a log-prob that is no number or {low}: its weights have "
                "diverged; lower learner.lr or go back to a checkpoint"
            )
        versions = np.full(len(answer.tokens), -1, np.int32)
        seen = [oldest]
        for label, first, end in answer.spans:
            mark, _, named = label.partition(":")
            if mark != self._mark:
                raise self._server.lose(
                    f"it samples from weights {label!r}, which are not ours: does another run use it?"
                )
            version = PolicyVersion.parse(named)
            if version.attempt != oldest.attempt:
                raise RetryableError(f"prompt {name!r} was sampled by weights of two attempts: it is sampled anew")
            if version < seen[-1]:
                raise self._server.lose(f"it samples from weights {version} after {seen[-1]} were in place")
            seen.append(version)
            versions[first:end] = version.iteration
        if len(versions) != len(answer.logprobs) or (versions < 0).any():
            raise self._server.lose(f"its answer to prompt {name!r} has tokens without a log-prob or a version")
        return Completion(
            prompt_id=name,
            tokens=np.asarray(answer.tokens, np.int32),
            logprobs=np.asarray(answer.logprobs, np.float32),
            versions=versions,
            attempt=oldest.attempt,
            finish=answer.finish,
        )

    def _write(self, read: Callable[[], Mapping[str, torch.Tensor]], version: PolicyVersion, file: Path) -> str:
        """Makes ``file`` of the weights, for the server; its digest. Raises ResourceError, FileNotFoundError."""
        with telemetry.span("rollout", "fetch weights"):
            found = read()
            tensors = self._layout.distinct(found, version)
        parts = encode(tensors)
        digest = xxhash.xxh3_128()
        try:
            for left in self._folder.glob(f"{self._prefix}*"):
                left.unlink(missing_ok=True)  # never written to: it may be a name of the learner's own file
            if isinstance(found, MappedTensors) and found.keys() == tensors.keys():
                linked = found.link(file)  # it is such a file already
                if linked is not None:
                    return linked
            with file.open("xb") as target:
                for part in parts:
                    digest.update(part)
                    target.write(part)
        except FileNotFoundError:  # the folder is gone
            raise
        except OSError as error:
            raise ResourceError(
                f"weights {version} cannot be written to {self._folder} ({error}): give it room for one copy of the "
                "weights for each engine server, and the rollout actors the right to write there"
            ) from error
        return digest.hexdigest()

    async def _swap(self, file: Path, digest: str, version: PolicyVersion) -> None:
        other_attempt = version.attempt != self._version.attempt
        if other_attempt:
            self._open.clear()
            self._interrupt(
                RetryableError(
                    f"weights {version} of another attempt came while requests of attempt {self._version.attempt} were "
                    "in flight: they are sampled anew"
                )
            )
        try:
            await self._dialect.swap(self._server, file, digest, self._label(version), abort=other_attempt)
        except asyncio.CancelledError:
            self._give_up(version, "it was cancelled")
            raise
        except SteadyhelmError as error:
            raise self._give_up(version, str(error)) from error
        self._version = version
        self._open.set()

    def _give_up(self, version: PolicyVersion, why: str) -> EngineLostError:
        """Ends a server whose weights have no name any more."""
        if self._process is not None:
            self._process.end()
        self._open.set()
        return self._server.lose(f"weights {version} were not swapped in as a whole ({why}), so it must not answer")

    def _call(self, work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        call = asyncio.create_task(work)
        self._calls.add(call)
        call.add_done_callback(self._calls.discard)
        return call

    def _interrupt(self, why: SteadyhelmError) -> None:
        """Ends what is in flight with ``why``."""
        self._why = why
        for call in self._calls:
            call.cancel()


async def _timed(calls: Sequence[asyncio.Task[Any]]) -> None:
    """Returns once all calls have ended; their time under way is one span of the caller's collection."""
    with telemetry.span("rollout", "generate", computes=True):
        if calls:
            await asyncio.wait(calls)
