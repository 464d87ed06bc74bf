"""The reference service: log-probs of the frozen starting policy."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray

from steadyhelm import telemetry
from steadyhelm.config.run import Data, Model, RunFile
from steadyhelm.data.types import ObjectRef, ShardRecord, Trajectory
from steadyhelm.models.batch import TokenSequence, collate
from steadyhelm.models.encoder import PromptEncoder
from steadyhelm.models.load import load_model
from steadyhelm.models.logprobs import completion_logprobs
from steadyhelm.services import Served
from steadyhelm.store import ObjectStore, open_store
from steadyhelm.store.codec import decode_rollout, encode_reference
from steadyhelm.store.images import get_image


@dataclass(frozen=True, slots=True, kw_only=True)
class ReferenceSpec:
    """What a reference scorer is built from, in whatever process.

    Example: ``ReferenceSpec.of(run, folder="runs/x/model", store_uri="runs")``
    """

    model: Model
    data: Data
    folder: str
    store_uri: str
    batch: int
    temperature: float
    device: str = "cpu"

    @classmethod
    def of(cls, run: RunFile, *, folder: str, store_uri: str, device: str = "cpu") -> ReferenceSpec:
        """The parts of a run file that a reference scorer needs."""
        return cls(
            model=run.model,
            data=run.data,
            folder=folder,
            store_uri=store_uri,
            batch=run.reference.batch,
            temperature=run.rollout.temperature,
            device=device,
        )


class ReferenceScorer:
    """A ``Reference``: scores shards with the policy's own distribution (temperature, token mask) of frozen weights.

    Args:
        model: from ``load_model``; never changed.
        encoder: of the same folder.
        store: where shards are read and scores put.
        batch: sequences scored together.
        temperature: the run's sampling temperature.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        encoder: PromptEncoder,
        store: ObjectStore,
        *,
        batch: int,
        temperature: float,
    ) -> None:
        self._model = model
        self._encoder = encoder
        self._store = store
        self._batch = batch
        self._temperature = temperature
        self._device = next(model.parameters()).device
        self._turn = asyncio.Lock()

    @classmethod
    def build(cls, spec: ReferenceSpec) -> ReferenceScorer:
        """The scorer of a run, model loaded. Raises ModelError, StoreError."""
        store = open_store(spec.store_uri)
        encoder = PromptEncoder(
            spec.folder,
            min_pixels=spec.data.min_pixels,
            max_pixels=spec.data.max_pixels,
            trust_remote_code=spec.model.trust_remote_code,
            fetch=partial(get_image, store),
        )
        model = load_model(
            spec.folder,
            dtype=spec.model.dtype,
            trust_remote_code=spec.model.trust_remote_code,
            device=spec.device,
        )
        return cls(model, encoder, store, batch=spec.batch, temperature=spec.temperature)

    async def score(self, shard: ShardRecord) -> Served[ObjectRef]:
        """Puts the log-probs of the shard's completions under its key with ``.reference``, in the shard's order.

        The same shard gives the same scores, so a second try writes the same object again.

        Raises:
            CorruptObjectError: the shard does not match its checksum.
            DataError: an image is corrupt, or a completion has a token that no policy may sample.
        """
        with telemetry.collect() as spans:
            async with self._turn:
                ref = await asyncio.to_thread(self._score, shard)
        return Served(value=ref, spans=tuple(spans))

    def _score(self, shard: ShardRecord) -> ObjectRef:
        with telemetry.span("reference", "read shard"):
            trajectories = decode_rollout(self._store.read(shard.rollout), shard.rollout.key)
        scores: list[NDArray[np.float32]] = []
        for start in range(0, len(trajectories), self._batch):
            scores += self._logprobs(trajectories[start : start + self._batch])
        with telemetry.span("reference", "put scores"):
            key = shard.rollout.key.removesuffix(".rollout") + ".reference"
            return self._store.put(key, encode_reference(scores))

    @torch.inference_mode()
    def _logprobs(self, trajectories: Sequence[Trajectory]) -> list[NDArray[np.float32]]:
        with telemetry.span("reference", "collate"):
            rows = [TokenSequence.of(trajectory) for trajectory in trajectories]
            batch = collate(rows, self._encoder).to(self._device)
        with telemetry.span("reference", "forward", computes=True):
            logprobs, _, mask = completion_logprobs(
                self._model, batch, temperature=self._temperature, banned_ids=self._encoder.banned_ids
            )
            found, lengths = logprobs.cpu().numpy(), mask.sum(1).tolist()
        return [row[:length].copy() for row, length in zip(found, lengths, strict=True)]
