"""The rollout of supervised fine-tuning: the data set's own traces as trajectories, no model and no sampling."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import numpy as np

from steadyhelm import telemetry
from steadyhelm.data.types import FinishReason, PolicyVersion, Prompt, ShardRecord, Trajectory, WeightsRecord
from steadyhelm.errors import DataError
from steadyhelm.models.encoder import PromptEncoder
from steadyhelm.services import Served, ShardOrder
from steadyhelm.services.rollout.shards import adopt_shard, put_shard
from steadyhelm.services.rollout.worker import RolloutSpec, make_encoder
from steadyhelm.store import ObjectStore, open_store


class TraceRollout:
    """A ``Rollout`` that writes each prompt's ``trace`` as its completion, with behaviour log-probs of 0.

    A trace longer than ``max_new_tokens`` is cut there and marked truncated; no end-of-sequence token is appended then.

    Args:
        encoder: of the model that is trained.
        store: where shards go.
        version: stands in every token's version.
        max_prompt_tokens: longest prompt.
        drop_overlong: whether a longer one is left out of the shard instead of ending the run.
    """

    def __init__(
        self,
        encoder: PromptEncoder,
        store: ObjectStore,
        *,
        version: PolicyVersion,
        max_prompt_tokens: int,
        drop_overlong: bool,
    ) -> None:
        self._encoder = encoder
        self._store = store
        self._version = version
        self._max_prompt_tokens = max_prompt_tokens
        self._drop_overlong = drop_overlong

    @classmethod
    def build(cls, spec: RolloutSpec) -> TraceRollout:
        """The worker of a run; loads tokenizer and image processor only. Raises ModelError, StoreError."""
        store = open_store(spec.store_uri)
        return cls(
            make_encoder(spec.folder, spec.model, spec.data, store),
            store,
            version=spec.version,
            max_prompt_tokens=spec.data.max_prompt_tokens,
            drop_overlong=spec.data.overlong == "drop",
        )

    async def rollout(self, order: ShardOrder) -> Served[ShardRecord]:
        """Puts the order's traces as a shard. Raises DataError, CorruptObjectError."""
        with telemetry.collect() as spans:
            put = await asyncio.to_thread(adopt_shard, self._store, order)
            if put is None:
                trajectories = await asyncio.to_thread(self._trajectories, order.prompts, order.sampling.max_new_tokens)
                put = await asyncio.to_thread(put_shard, self._store, order, trajectories)
        return Served(value=put.record, spans=tuple(spans), metrics=put.metrics)

    async def apply_weights(self, weights: WeightsRecord) -> Served[None]:
        """Does nothing: traces have no policy."""
        return Served(value=None)

    async def health(self) -> None:
        """Returns: there is nothing that could be lost."""

    async def drain(self, deadline_s: float) -> None:
        """Returns: an order holds nothing back."""

    def _trajectories(self, prompts: Sequence[Prompt], max_new_tokens: int) -> list[Trajectory]:
        with telemetry.span("rollout", "encode"):
            made = [self._trajectory(prompt, max_new_tokens) for prompt in prompts]
        return [trajectory for trajectory in made if trajectory is not None]

    def _trajectory(self, prompt: Prompt, max_new_tokens: int) -> Trajectory | None:
        if prompt.trace is None:
            raise DataError(
                f"prompt {prompt.prompt_id!r} (pair {prompt.pair_id!r}) has no trace to imitate: give each pair of the "
                "data set a trace, or train with another algorithm.type"
            )
        try:
            prompt_tokens = self._encoder.encode(prompt.text, prompt.images)
            tokens = self._encoder.encode_completion(prompt.trace)
        except DataError as error:
            raise DataError(f"prompt {prompt.prompt_id!r} (pair {prompt.pair_id!r}): {error}") from error
        if len(prompt_tokens) > self._max_prompt_tokens:
            if self._drop_overlong:
                return None
            raise DataError(
                f"prompt {prompt.prompt_id!r} (pair {prompt.pair_id!r}) has {len(prompt_tokens)} tokens but "
                f"data.max_prompt_tokens is {self._max_prompt_tokens}: raise it or set data.overlong to 'drop'"
            )
        finish = FinishReason.STOP if len(tokens) <= max_new_tokens else FinishReason.LENGTH
        tokens = tokens[:max_new_tokens]
        return Trajectory(
            prompt=prompt,
            prompt_tokens=prompt_tokens,
            tokens=tokens,
            logprobs=np.zeros(len(tokens), np.float32),
            versions=np.full(len(tokens), self._version.iteration, np.int32),
            attempt=self._version.attempt,
            finish=finish,
            completion_text=self._encoder.decode(tokens),
        )
