"""The seams: what the loop, the learner and the engines know of each other.

A service is a plain class in a module of this package; it imports no other service and no Ray. ``runtime`` puts each
into processes of its own and gives the loop handles with these same methods. Shards, weights and checkpoints pass by
key through the object store; a method takes and returns small records only.

Every method answers with ``Served``: the value, the spans of time that the call took in the service's process, and
its metrics by the names of ``telemetry``. Errors are those of ``errors``: a ``RetryableError`` may be tried again,
elsewhere too, with the same arguments; calls are idempotent under the same ids.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Generic, Protocol, TypeVar, runtime_checkable

from steadyhelm.data.types import (
    BatchManifest,
    CheckpointRecord,
    Completion,
    EngineRequest,
    ImageKey,
    ObjectRef,
    PolicyVersion,
    Prompt,
    PromptId,
    Sampling,
    ShardRecord,
    Span,
    WeightsRecord,
)

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class Served(Generic[T]):
    """An answer of a service, with the time it took and its metrics.

    Example: ``Served(value=record, spans=(Span(...),), metrics={"rollout/tokens": 4210.0})``
    """

    value: T
    spans: tuple[Span, ...] = ()
    metrics: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardOrder:
    """One shard to roll out: an engine batch of prompts and the key its trajectories go to.

    ``min_version`` is the oldest policy iteration that may sample its first token; 0 for traces (SFT).

    Example: ``ShardOrder(key="digits/batches/000012/1-0.rollout", shard=0, prompts=(...), sampling=Sampling(...),
    min_version=11)``
    """

    key: str
    shard: int
    prompts: tuple[Prompt, ...]
    sampling: Sampling
    min_version: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Coming:
    """Some of what the learner will need for the batch of ``iteration``, which is still in the making.

    ``images`` are of its prompts, ``objects`` those of its shards that are in the store.

    Example: ``Coming(iteration=12, objects=(ObjectRef(key="digits/batches/000012/1-0.rollout", ...),))``
    """

    iteration: int
    images: tuple[ImageKey, ...] = ()
    objects: tuple[ObjectRef, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineLoad:
    """What the engines of a rollout service had to do since the last look; means over time.

    ``serving`` of ``desired`` engines take orders. ``saturation`` is the share of a whole order that an engine had in
    hand, at most 1 each; ``in_flight_tokens`` the expected tokens of all orders that engines had; ``queue`` the most
    orders that were sent or waiting at once, per engine. ``room`` is how many engines there was room for when one could
    last not be placed, None where there is no such limit.

    Example: ``EngineLoad(serving=2, desired=2, saturation=0.93, in_flight_tokens=6100.0, queue=4.0)``
    """

    serving: int
    desired: int
    saturation: float
    in_flight_tokens: float
    queue: float
    room: int | None = None


class RolloutEngine(Protocol):
    """Samples completions: token ids in, token ids and log-probs out."""

    @property
    def version(self) -> PolicyVersion:
        """The policy version whose weights the next token is sampled from."""
        ...

    def generate(self, requests: Sequence[EngineRequest], sampling: Sampling) -> AsyncGenerator[Completion, None]:
        """Completions as they finish, in any order; closing it ends the work. Raises EngineLostError, DataError."""
        ...

    async def apply_weights(self, weights: WeightsRecord) -> None:
        """Serves ``weights`` from the next token on. Raises CorruptObjectError; then the old version goes on."""
        ...

    async def health(self) -> None:
        """Returns where the engine can serve. Raises EngineLostError."""
        ...

    async def drain(self, deadline_s: float) -> None:
        """Takes no new requests and returns once those in flight are done. Raises DeadlineError."""
        ...

    async def close(self) -> None:
        """Ends the engine and what it started; whatever is in flight is lost."""
        ...


class PromptSource(Protocol):
    """The data set with its cursor: which prompts an iteration gets, order-swapped, images by key."""

    async def prompts(self, iteration: int) -> Served[tuple[Prompt, ...]]:
        """The prompts of ``iteration`` (from 1), the same at every call. Raises DataError."""
        ...

    async def replacement(self, prompt_id: PromptId) -> Served[Prompt]:
        """Another sample of the same prompt, under the id with its retry counted up."""
        ...

    async def held_out(self, limit: int) -> Served[tuple[Prompt, ...]]:
        """Each of the first ``limit`` (0: all) evaluation pairs in both orders, side by side."""
        ...


class Rollout(Protocol):
    """Makes trajectory shards: one worker, or a pool of them."""

    async def rollout(self, order: ShardOrder) -> Served[ShardRecord]:
        """Samples the order's completions and puts the shard. Raises DataError, EngineLostError, DeadlineError."""
        ...

    async def apply_weights(self, weights: WeightsRecord) -> Served[None]:
        """Returns once every serving engine has ``weights``.

        Raises CorruptObjectError, ObjectMissingError, DeadlineError; LearnerLostError where a learner rank that has to
        send them does not.
        """
        ...


@runtime_checkable
class Elastic(Protocol):
    """A rollout service whose engines come and go."""

    def load(self) -> EngineLoad:
        """What the engines had to do since the last call."""
        ...

    def glance(self) -> EngineLoad:
        """The same up to now; the next ``load`` still tells of all of it."""
        ...

    def scale(self, desired: int) -> None:
        """Wants so many engines from now on; returns at once."""
        ...


class Reference(Protocol):
    """Log-probs of the frozen starting policy."""

    async def score(self, shard: ShardRecord) -> Served[ObjectRef]:
        """Puts the reference log-probs of the shard's completions."""
        ...


class Reward(Protocol):
    """Scores of trajectories."""

    async def score(self, shard: ShardRecord) -> Served[tuple[ObjectRef, tuple[bool, ...]]]:
        """Puts the shard's ``Rewards``; returns their object and which samples are valid, in the shard's order."""
        ...


class Learner(Protocol):
    """The policy under training."""

    def expect(self, coming: Coming) -> None:
        """Tells what a batch to come will need, as it becomes known; returns at once.

        Only a hint: the batch may come without it, or not at all, and what was never told of is trained on all the
        same.
        """
        ...

    async def restore(self, checkpoint: CheckpointRecord | None) -> Served[None]:
        """Takes the state of ``checkpoint``, or of the starting point. Raises CorruptObjectError, DeadlineError."""
        ...

    async def step(self, manifest: BatchManifest) -> Served[None]:
        """Trains on the batch, all its optimiser steps. Raises NonFiniteError, CorruptObjectError, LearnerLostError."""
        ...

    async def publish(
        self, version: PolicyVersion, key: str, known: WeightsRecord | None = None
    ) -> Served[WeightsRecord]:
        """Puts the current weights under the prefix ``key``.

        Where ``known`` has the checksum of the current weights, nothing is put and ``known`` is the answer.
        """
        ...

    async def save(self, version: PolicyVersion, key: str) -> Served[CheckpointRecord]:
        """Puts weights, optimiser state and counters under the prefix ``key``."""
        ...

    async def export(self, key: str) -> Served[tuple[ObjectRef, ...]]:
        """Puts the policy as a Hugging Face model folder under the prefix ``key``."""
        ...
