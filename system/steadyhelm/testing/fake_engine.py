"""A rollout engine without a neural network: a bigram table that sees images by their bytes.

It keeps every promise of ``services.RolloutEngine`` and needs neither torch nor a model folder; the contract suite of
the real engines runs over it. ``logprobs`` answers what a trainer of the same policy would.
"""

from __future__ import annotations

import asyncio
import zlib
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from steadyhelm.data.types import (
    Completion,
    EngineRequest,
    FinishReason,
    ImageKey,
    PolicyVersion,
    Sampling,
    WeightsRecord,
)
from steadyhelm.errors import DataError, DeadlineError, EngineLostError, ModelError, RetryableError

TABLE = "table"
"""Name of the one tensor: logits [V, V] float32 of the next token (column) by the last one (row)."""


class FakeEngine:
    """A ``RolloutEngine`` over a bigram table.

    Args:
        table: logits [V, V] float32.
        eos_id: ends a completion.
        banned_ids: are never sampled.
        version: whose weights ``table`` is.
        fetch: reads a version's ``{TABLE: array}``, verified.
        fetch_image: encoded bytes of an image; anything that is not a PNG counts as corrupt.
        token_s: seconds that one token takes.
    """

    def __init__(
        self,
        table: NDArray[np.float32],
        *,
        eos_id: int,
        banned_ids: Sequence[int],
        version: PolicyVersion,
        fetch: Callable[[WeightsRecord], Mapping[str, NDArray[np.float32]]],
        fetch_image: Callable[[ImageKey], bytes],
        token_s: float = 0.0,
    ) -> None:
        self._table = table
        self._eos_id = eos_id
        self._banned_ids = list(banned_ids)
        self._version = version
        self._fetch = fetch
        self._fetch_image = fetch_image
        self._token_s = token_s
        self._in_flight = 0
        self._idle = asyncio.Event()
        self._idle.set()
        self._draining = False

    @property
    def version(self) -> PolicyVersion:
        """The policy version whose weights the next token is sampled from."""
        return self._version

    async def generate(self, requests: Sequence[EngineRequest], sampling: Sampling) -> AsyncGenerator[Completion, None]:
        """Completions in the order of the requests. Raises EngineLostError, RetryableError, DataError."""
        if self._draining:
            raise EngineLostError("the fake engine is draining and takes no new requests: send them to another")
        self._in_flight += 1
        self._idle.clear()
        try:
            for request in requests:
                yield await self._complete(request, sampling)
        finally:
            self._in_flight -= 1
            if not self._in_flight:
                self._idle.set()

    async def apply_weights(self, weights: WeightsRecord) -> None:
        """Serves ``weights`` from the next token on. Raises CorruptObjectError, ModelError."""
        arrays = self._fetch(weights)
        if set(arrays) != {TABLE} or np.shape(arrays[TABLE]) != self._table.shape:
            raise ModelError(f"weights {weights.version} do not fit the fake engine's table {self._table.shape}")
        self._table = np.asarray(arrays[TABLE], np.float32)
        self._version = weights.version

    async def health(self) -> None:
        """Returns: it lives as long as its process."""

    async def drain(self, deadline_s: float) -> None:
        """Takes no new requests and returns once those in flight are done. Raises DeadlineError."""
        self._draining = True
        try:
            await asyncio.wait_for(self._idle.wait(), deadline_s)
        except TimeoutError as error:
            raise DeadlineError(f"the fake engine has calls in flight after {deadline_s} s of draining") from error

    async def close(self) -> None:
        """Takes no new requests."""
        self._draining = True

    def logprobs(
        self, request: EngineRequest, tokens: NDArray[np.int32], temperature: float = 1.0
    ) -> NDArray[np.float32]:
        """Log-probs [T] of a completion under the current weights."""
        before = [int(request.prompt_tokens[-1]), *(int(token) for token in tokens[:-1])]
        sight = self._sight(request)
        rows = [
            self._distribution(token, sight, temperature)[choice] for token, choice in zip(before, tokens, strict=True)
        ]
        return np.asarray(rows, np.float32)

    def _sight(self, request: EngineRequest) -> NDArray[np.float64]:
        """What the images add to the logits [V]; another order of the same images adds something else."""
        total = np.zeros(len(self._table))
        for place, key in enumerate(request.images):
            data = self._fetch_image(key)
            if not data.startswith(b"\x89PNG"):
                raise DataError(f"image {key} of prompt {request.prompt_id!r} is not a PNG: replace or remove it")
            total += 4.0 * _uniforms(len(total), (zlib.crc32(data), place)) - 2.0
        return total

    def _distribution(self, last: int, sight: NDArray[np.float64], temperature: float) -> NDArray[np.float64]:
        logits = (self._table[last] + sight) / temperature
        logits[self._banned_ids] = -np.inf
        shifted: NDArray[np.float64] = logits - logits.max()
        normalised: NDArray[np.float64] = shifted - np.log(np.exp(shifted).sum())
        return normalised

    async def _complete(self, request: EngineRequest, sampling: Sampling) -> Completion:
        sight, last, attempt = self._sight(request), int(request.prompt_tokens[-1]), self._version.attempt
        tokens: list[int] = []
        logprobs: list[float] = []
        versions: list[int] = []
        while len(tokens) < sampling.max_new_tokens and (not tokens or last != self._eos_id):
            if self._version.attempt != attempt:
                raise RetryableError(f"weights {self._version} of another attempt came in flight: sampled anew")
            row = self._distribution(last, sight, 1.0 if sampling.greedy else sampling.temperature)
            (uniform,) = _uniforms(1, (request.seed, len(tokens)))
            cdf = np.exp(row).cumsum()
            last = int(row.argmax() if sampling.greedy else np.searchsorted(cdf, uniform * cdf[-1], side="right"))
            tokens.append(last)
            logprobs.append(float(row[last]))
            versions.append(self._version.iteration)
            await asyncio.sleep(self._token_s)
        return Completion(
            prompt_id=request.prompt_id,
            tokens=np.asarray(tokens, np.int32),
            logprobs=np.asarray(logprobs, np.float32),
            versions=np.asarray(versions, np.int32),
            attempt=attempt,
            finish=FinishReason.STOP if last == self._eos_id else FinishReason.LENGTH,
        )


def _uniforms(n: int, key: tuple[int, int]) -> NDArray[np.float64]:
    """Numbers [n] in [0, 1): the upper 53 of each 64 bits of Philox keyed by ``key``."""
    raw = np.random.Philox(key=np.array(key, dtype=np.uint64)).random_raw(n)
    return (raw >> np.uint64(11)).astype(np.float64) * 2.0**-53
