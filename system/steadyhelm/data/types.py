"""The records that pass between the services.

All are frozen, keyword-only and free of frameworks: numbers, strings, bytes and numpy arrays. Torch tensors are
made at the learner. Array shapes: ``P`` prompt tokens, ``T`` completion tokens, ``N`` trajectories of a shard.
``PromptId`` and ``PolicyVersion`` are the two identities that everything else hangs on.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, NewType

import numpy as np
from numpy.typing import NDArray

from steadyhelm.telemetry.spans import Span as Span

PromptId = NewType("PromptId", str)
"""``"<epoch>:<index>"``, or ``"<epoch>:<index>r<retry>"`` for a replacement, with ``s<sample>`` where a prompt has
more than one sample. Example: ``"0:17"``, ``"0:17s3"``, ``"2:5r1"``."""

ImageKey = NewType("ImageKey", str)
"""Key of an image in the object store: ``"images/<sha256 of the encoded bytes>"``."""


@dataclass(frozen=True, slots=True, kw_only=True, order=True)
class PolicyVersion:
    """A state of the policy: the weights after ``iteration`` iterations, as ``attempt`` published them.

    Example: ``PolicyVersion(iteration=12, attempt=1)``; iteration 0 is the weights that the run starts from.
    """

    iteration: int
    attempt: int

    def __str__(self) -> str:
        return f"{self.iteration}.{self.attempt}"

    @classmethod
    def parse(cls, text: str) -> PolicyVersion:
        """The version that ``str(version)`` printed. Raises ValueError for any other text."""
        iteration, _, attempt = text.partition(".")
        return cls(iteration=int(iteration), attempt=int(attempt))


class FinishReason(StrEnum):
    """Why a completion ended."""

    STOP = "stop"  # the policy sampled an end-of-sequence token; it is the last token of the completion
    LENGTH = "length"  # truncated at max_new_tokens; no end-of-sequence token was sampled and none is appended
    ABORT = "abort"  # ended by the engine; such a trajectory is never trained on


@dataclass(frozen=True, slots=True, kw_only=True)
class PreferencePair:
    r"""A question about images with two responses, one of which is better.

    ``images`` holds encoded bytes (PNG, JPEG, …) as a data set yields them. ``label`` is 1 or 2: the better slot.
    ``trace`` is a completion to imitate in supervised fine-tuning, None where there is none.
    ``meta`` goes with the sample into reports and evaluations unread.

    Example: ``PreferencePair(pair_id="train-7", question="Which digit is it?", responses=("It is 3.", "It is 5."),
    label=1, images=(b"\x89PNG...",))``
    """

    pair_id: str
    question: str
    responses: tuple[str, str]
    label: int
    images: tuple[bytes, ...] = ()
    trace: str | None = None
    meta: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """One rollout to make, as the driver sends it: a small record, images by key.

    ``text`` is the user message (the template filled in), without image placeholders and without chat template.
    ``label`` and ``meta`` go to the reward service with the trajectory. ``trace`` is set in supervised fine-tuning
    only. ``seed`` is a 63-bit counter hash of (run seed, epoch, index, sample): see ``data.cursor``.
    ``swapped`` says whether the two responses are in the opposite order of the record's.

    Example: ``Prompt(prompt_id=PromptId("0:17"), group_id="0:17", text="Which ...", images=(ImageKey("images/9f"),),
    label=2, swapped=True, seed=8812731)``
    """

    prompt_id: PromptId
    group_id: str
    text: str
    images: tuple[ImageKey, ...]
    label: int
    swapped: bool
    seed: int
    pair_id: str = ""
    trace: str | None = None
    meta: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How completions are sampled. ``greedy`` takes the arg-max and reports log-probs at temperature 1.

    Training refuses top-p and top-k, so they are not here.

    Example: ``Sampling(max_new_tokens=64, temperature=1.0)``
    """

    max_new_tokens: int
    temperature: float = 1.0
    greedy: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineRequest:
    """What a rollout engine is asked for: token ids in, token ids out.

    ``prompt_tokens`` [P] has every image placeholder already expanded to the image's number of tokens.
    Generation of the same ``prompt_id`` and ``seed`` on the same version is idempotent.
    """

    prompt_id: PromptId
    prompt_tokens: NDArray[np.int32]
    images: tuple[ImageKey, ...]
    seed: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Completion:
    """What a rollout engine answers.

    ``tokens`` [T] int32 (with the end-of-sequence token where one was sampled), ``logprobs`` [T] float32 of the very
    distribution that was sampled (after temperature and token mask), ``versions`` [T] int32: the policy *iteration*
    that sampled each token; ``attempt`` belongs to all of them.
    """

    prompt_id: PromptId
    tokens: NDArray[np.int32]
    logprobs: NDArray[np.float32]
    versions: NDArray[np.int32]
    attempt: int
    finish: FinishReason


@dataclass(frozen=True, slots=True, kw_only=True)
class Trajectory:
    """A prompt with its completion: one element of a rollout shard.

    ``prompt_tokens`` [P] int32, ``tokens`` [T] int32, ``logprobs`` [T] float32 (behaviour policy), ``versions`` [T]
    int32. ``completion_text`` is the decoded completion with special tokens kept, end-of-sequence removed; reward
    terms read it, the learner never does.
    """

    prompt: Prompt
    prompt_tokens: NDArray[np.int32]
    tokens: NDArray[np.int32]
    logprobs: NDArray[np.float32]
    versions: NDArray[np.int32]
    attempt: int
    finish: FinishReason
    completion_text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Rewards:
    """The scores of a shard's trajectories, in its order.

    ``total`` [N] float32, ``valid`` [N] bool: False means *unscored*; ``total`` is then NaN and must not be read.
    ``components`` holds each reward part [N] float32 (NaN where that part could not be scored). ``detail`` has one
    JSON-able mapping per sample for reports (extracted answer, judge's words, the error of an unscored sample).
    """

    total: NDArray[np.float32]
    valid: NDArray[np.bool_]
    components: Mapping[str, NDArray[np.float32]]
    detail: tuple[Mapping[str, Any], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class ObjectRef:
    """An immutable object by key, with what proves that its bytes are the ones that were meant.

    Example: ``ObjectRef(key="digits/batches/000012/1-0.rollout", num_bytes=18231, xxh3="9a..32 hex digits")``
    """

    key: str
    num_bytes: int
    xxh3: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardRecord:
    """One shard of an iteration's batch: what the driver knows of it.

    ``rollout`` names the trajectories, ``reward`` and ``reference`` what was added (None until scored; ``reference``
    stays None when β = 0). ``prompt_ids`` are in the shard's order; ``valid`` too (empty until rewarded).
    ``min_version`` and ``max_version`` bound the policy iterations that sampled its tokens; ``attempt`` is the one that
    published ``min_version``, so that the two name a policy version. ``oldest`` is the least policy iteration that
    sampled a token of each trajectory; empty where that is ``min_version`` for all of them, and in records from before
    there was this field. ``valid`` is False for what was dropped, too.
    """

    shard: int
    rollout: ObjectRef
    prompt_ids: tuple[PromptId, ...]
    num_tokens: int
    min_version: int
    max_version: int
    attempt: int
    reward: ObjectRef | None = None
    reference: ObjectRef | None = None
    valid: tuple[bool, ...] = ()
    oldest: tuple[int, ...] = ()

    @property
    def kept(self) -> tuple[bool, ...]:
        """``valid`` of each trajectory; all of them are until rewarded."""
        return self.valid or (True,) * len(self.prompt_ids)

    @property
    def oldest_versions(self) -> tuple[int, ...]:
        """``oldest`` of each trajectory, also where the record leaves it out."""
        return self.oldest or (self.min_version,) * len(self.prompt_ids)


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchManifest:
    """The batch of one iteration, as the commit log names it: everything the learner needs to step it again.

    ``policy`` is the oldest policy version that sampled a token of it, as the engine answered it.
    ``outcomes`` maps each issued prompt id to ``"trained"``, ``"dropped:<reason>"``, ``"replaced:<id>"`` or
    ``"unscored:<policy>"``. ``metrics`` are the finite ones of rollout and scoring, so that a replay shows them again.
    """

    iteration: int
    policy: PolicyVersion
    shards: tuple[ShardRecord, ...]
    outcomes: Mapping[PromptId, str]
    metrics: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightsRecord:
    """A published policy version: its objects and a checksum over the whole set of tensors.

    ``base`` is None for an anchor (full tensors) and the version a delta applies to otherwise.
    ``checksum`` is xxh3-128 over names, dtypes, shapes and bytes of all tensors in sorted order of name.
    """

    version: PolicyVersion
    objects: tuple[ObjectRef, ...]
    checksum: str
    base: PolicyVersion | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointRecord:
    """A saved learner state: its objects; ``version`` is the policy it belongs to."""

    version: PolicyVersion
    objects: tuple[ObjectRef, ...]
