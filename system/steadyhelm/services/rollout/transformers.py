"""The rollout engine inside the actor: Transformers models, our own decode loop.

One thread owns the model. Bursts of decode steps and weight swaps queue for it in order, so a swap falls between two
decode steps, the event loop stays free to answer ``health``, and the model needs no lock. Calls take turns in the order
they came; the input of the next one is collated meanwhile. In-flight rows keep their
key-value cache over a swap: their later tokens come from the new weights on keys and values of the old, and carry the
new version, which is what the learner's correction for staleness expects.
"""

from __future__ import annotations

import asyncio
import contextvars
import time
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TypeVar

import torch

from steadyhelm import telemetry
from steadyhelm.data.types import Completion, EngineRequest, PolicyVersion, Sampling, WeightsRecord
from steadyhelm.errors import DeadlineError, EngineLostError, ResourceError, RetryableError
from steadyhelm.models.decode import Decoding
from steadyhelm.models.encoder import PromptEncoder
from steadyhelm.services.rollout.settled import settled
from steadyhelm.services.rollout.swap import Swap

T = TypeVar("T")

BURST_S = 0.05
"""Seconds of decode steps between two visits to the event loop: how late a completion is yielded at most."""

WeightsFetch = Callable[[WeightsRecord], Mapping[str, torch.Tensor]]
"""Reads and verifies a version's tensors, which stay as they are while the mapping lives; raises CorruptObjectError."""


class TransformersEngine:
    """A ``RolloutEngine`` over a Transformers model.

    Args:
        model: from ``load_model``; the engine owns it from here on.
        encoder: of the same model folder.
        batch: sequences generated together.
        version: whose weights ``model`` has.
        fetch: reads a version's tensors, which the model then serves as they are, on a CPU without a copy.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        encoder: PromptEncoder,
        *,
        batch: int,
        version: PolicyVersion,
        fetch: WeightsFetch,
    ) -> None:
        self._model = model
        self._encoder = encoder
        self._batch = batch
        self._version = version
        self._fetch = fetch
        self._served: Swap | None = None  # holds the tensors that the model has
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="engine")
        self._turn = asyncio.Lock()
        self._taking = asyncio.Lock()
        self._swaps_waiting = 0
        self._in_flight = 0
        self._idle = asyncio.Event()
        self._idle.set()
        self._draining = False
        self._closed = False

    @property
    def version(self) -> PolicyVersion:
        """The policy version whose weights the next token is sampled from."""
        return self._version

    async def generate(self, requests: Sequence[EngineRequest], sampling: Sampling) -> AsyncGenerator[Completion, None]:
        """Completions as they finish, in any order; closing the iterator ends the work within one burst.

        Raises:
            EngineLostError: the engine is drained or closed.
            RetryableError: weights of another attempt came while the requests were in flight.
            DataError: an image is corrupt or a prompt does not match its images.
            NonFiniteError: the policy's logits are not finite.
            ResourceError: the device has too little memory.
        """
        if self._draining or self._closed:
            raise EngineLostError("the rollout engine is draining and takes no new requests: send them to another")
        self._in_flight += 1
        self._idle.clear()
        try:
            for start in range(0, len(requests), self._batch):
                part = requests[start : start + self._batch]
                decoding = await asyncio.to_thread(self._begin, part, sampling)
                async with self._turn:
                    attempt = self._version.attempt
                    while not decoding.finished:
                        for completion in await self._on_thread(partial(self._burst, decoding, attempt)):
                            yield completion
        finally:
            self._in_flight -= 1
            if not self._in_flight:
                self._idle.set()

    async def apply_weights(self, weights: WeightsRecord) -> None:
        """Serves ``weights`` from the next token on; nothing of them is applied before all of them are verified.

        Raises:
            CorruptObjectError: an object or the set does not match its checksum.
            ModelError: names, shapes or types are not this model's.
        """
        async with self._taking:
            if weights.version == self._version:
                return
            await settled(self._take(weights))  # one at a time fetches

    async def health(self) -> None:
        """Returns where the engine can serve. Raises EngineLostError."""
        if self._closed:
            raise EngineLostError("the rollout engine is closed: start another")

    async def drain(self, deadline_s: float) -> None:
        """Takes no new requests and returns once those in flight are done. Raises DeadlineError."""
        self._draining = True
        try:
            await asyncio.wait_for(self._idle.wait(), deadline_s)
        except TimeoutError as error:
            raise DeadlineError(
                f"the rollout engine still has {self._in_flight} calls in flight after {deadline_s} s of draining: "
                "give it longer, or end it and send its requests to another"
            ) from error

    async def close(self) -> None:
        """Ends the engine's thread once its current burst is done."""
        self._closed = True
        await asyncio.to_thread(self._thread.shutdown, wait=True)

    async def _take(self, weights: WeightsRecord) -> None:
        swap = await asyncio.to_thread(self._prepared, weights)
        self._swaps_waiting += 1
        try:
            await self._on_thread(partial(self._put, swap, weights.version))
        finally:
            self._swaps_waiting -= 1
        await asyncio.to_thread(swap.forget_former)

    async def _on_thread(self, work: Callable[[], T]) -> T:
        """Runs ``work`` on the thread that owns the model, in this context (so that its spans are collected)."""
        context = contextvars.copy_context()
        return await asyncio.get_running_loop().run_in_executor(self._thread, context.run, work)

    def _begin(self, requests: Sequence[EngineRequest], sampling: Sampling) -> Decoding:
        with telemetry.span("rollout", "collate"):
            return Decoding(self._model, self._encoder, requests, sampling)

    def _burst(self, decoding: Decoding, attempt: int) -> list[Completion]:
        """Decode steps until something finished and ``BURST_S`` are over, or a swap waits."""
        if self._version.attempt != attempt:
            raise RetryableError(
                f"weights {self._version} of another attempt came while requests of attempt {attempt} were in flight: "
                "they are sampled anew"
            )
        completions: list[Completion] = []
        end = time.monotonic() + BURST_S
        with telemetry.span("rollout", "generate", computes=True):
            while not decoding.finished:
                try:
                    completions += decoding.advance(self._version)
                except torch.OutOfMemoryError as error:
                    raise ResourceError(
                        f"the device has too little memory to generate {self._batch} sequences together ({error}): "
                        "lower rollout.engine.batch or rollout.max_new_tokens"
                    ) from error
                if self._swaps_waiting or time.monotonic() > end:
                    break
        return completions

    def _prepared(self, weights: WeightsRecord) -> Swap:
        """All that can be done for ``weights`` while the model serves."""
        with telemetry.span("rollout", "fetch weights"):
            return Swap(self._model, self._fetch(weights), weights.version)

    def _put(self, swap: Swap, version: PolicyVersion) -> None:
        with telemetry.span("rollout", "swap weights"):
            swap.put()
            self._version, self._served = version, swap
