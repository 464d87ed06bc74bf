"""An iteration's committed batch as the learner sees it: every rank knows all small numbers of all rows.

Shape legend: N trajectories of the iteration in the manifest's order, T completion tokens of the longest.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from steadyhelm.data.types import BatchManifest, FinishReason, ObjectRef, ShardRecord, Trajectory
from steadyhelm.errors import DataError
from steadyhelm.store import Reader, read_all
from steadyhelm.store.codec import decode_reference, decode_rewards, decode_rollout


@dataclass(frozen=True, slots=True, kw_only=True)
class IterationBatch:
    """The rows of an iteration.

    ``rewards`` [N] float32, NaN where there is none (all of them in supervised fine-tuning); ``valid`` [N] bool:
    scored, not dropped, not aborted and not empty; ``group_ids`` [N] int64; ``mask`` [N, T] bool; ``behaviour`` and
    ``reference`` [N, T] float32, 0 outside the mask, ``reference`` None without a reference policy; ``lengths`` [N]
    int64 of prompt and completion; ``ages`` [N, T] int32: versions between sampling and this step.
    """

    iteration: int
    trajectories: tuple[Trajectory, ...]
    rewards: torch.Tensor
    valid: torch.Tensor
    group_ids: torch.Tensor
    mask: torch.Tensor
    behaviour: torch.Tensor
    reference: torch.Tensor | None
    lengths: NDArray[np.int64]
    ages: torch.Tensor

    def __len__(self) -> int:
        return len(self.trajectories)

    def valid_rows(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        """Those of the positions ``rows`` that count."""
        counted: NDArray[np.int64] = rows[self.valid.numpy()[rows]]
        return counted


def read_batch(store: Reader, manifest: BatchManifest, *, with_rewards: bool, with_reference: bool) -> IterationBatch:
    """The manifest's shards, verified, read side by side.

    Args:
        store: reads the shards.
        manifest: of a committed batch.
        with_rewards: False in supervised fine-tuning.
        with_reference: whether the objective needs reference log-probs.

    Raises:
        CorruptObjectError: an object is not the one that the manifest names.
        ObjectMissingError: an object is gone.
        DataError: a shard lacks rewards or reference log-probs, or its parts do not fit together.
    """
    trajectories: list[Trajectory] = []
    rewards: list[NDArray[np.float32]] = []
    scored: list[NDArray[np.bool_]] = []
    reference: list[NDArray[np.float32]] = []
    wanted = [shard.rollout for shard in manifest.shards]
    wanted += [_needed(shard, "reward") for shard in manifest.shards if with_rewards]
    wanted += [_needed(shard, "reference") for shard in manifest.shards if with_reference]
    data = dict(zip(wanted, read_all(store, wanted), strict=True))
    for shard in manifest.shards:
        rows = decode_rollout(data[shard.rollout])
        trajectories += rows
        kept = np.array(shard.kept, np.bool_)  # the driver drops what is too old
        if with_rewards:
            found = decode_rewards(data[_needed(shard, "reward")])
            _check_length(shard, "rewards", len(found.total), len(rows))
            rewards.append(np.where(found.valid, found.total, np.float32(np.nan)))
            scored.append(found.valid & kept)
        else:
            rewards.append(np.full(len(rows), np.nan, np.float32))
            scored.append(kept)
        if with_reference:
            scores = decode_reference(data[_needed(shard, "reference")])
            _check_length(shard, "reference log-probs", len(scores), len(rows))
            reference += scores
    return _assemble(manifest, trajectories, rewards, scored, reference if with_reference else None)


def _assemble(
    manifest: BatchManifest,
    trajectories: list[Trajectory],
    rewards: list[NDArray[np.float32]],
    scored: list[NDArray[np.bool_]],
    reference: list[NDArray[np.float32]] | None,
) -> IterationBatch:
    usable = np.array([row.finish != FinishReason.ABORT and len(row.tokens) > 0 for row in trajectories], np.bool_)
    mask, behaviour = _padded([row.logprobs for row in trajectories])
    for row in trajectories:
        if len(row.logprobs) != len(row.tokens):
            raise DataError(
                f"the trajectory of prompt {row.prompt.prompt_id} has {len(row.tokens)} tokens but {len(row.logprobs)} "
                "log-probs: its shard was written wrongly, roll it out again"
            )
    if reference is not None:
        for row, scores in zip(trajectories, reference, strict=True):
            if len(scores) != len(row.tokens):
                raise DataError(
                    f"prompt {row.prompt.prompt_id} has {len(row.tokens)} tokens but {len(scores)} reference "
                    "log-probs: score its shard again"
                )
    groups = {name: number for number, name in enumerate(dict.fromkeys(row.prompt.group_id for row in trajectories))}
    _, versions = _padded([row.versions for row in trajectories])
    return IterationBatch(
        iteration=manifest.iteration,
        trajectories=tuple(trajectories),
        rewards=torch.from_numpy(np.concatenate(rewards) if rewards else np.zeros(0, np.float32)),
        valid=torch.from_numpy(np.concatenate(scored) & usable if scored else usable),
        group_ids=torch.tensor([groups[row.prompt.group_id] for row in trajectories], dtype=torch.int64),
        mask=mask,
        behaviour=behaviour,
        reference=None if reference is None else _padded(reference)[1],
        lengths=np.array([len(row.prompt_tokens) + len(row.tokens) for row in trajectories], np.int64),
        ages=torch.where(mask, manifest.iteration - 1 - versions, 0),
    )


def _padded(rows: Sequence[NDArray[np.float32] | NDArray[np.int32]]) -> tuple[torch.Tensor, torch.Tensor]:
    """The rows on the right of which zeros are padded [N, T], behind a mask [N, T] of what is theirs."""
    width = max((len(row) for row in rows), default=0)
    dtype = rows[0].dtype if rows else np.dtype(np.float32)
    values = np.zeros((len(rows), width), dtype)
    mask = np.zeros((len(rows), width), np.bool_)
    for n, row in enumerate(rows):
        values[n, : len(row)] = row
        mask[n, : len(row)] = True
    return torch.from_numpy(mask), torch.from_numpy(values)


def _needed(shard: ShardRecord, part: str) -> ObjectRef:
    ref = shard.reward if part == "reward" else shard.reference
    if ref is None:
        raise DataError(f"shard {shard.rollout.key} has no {part} object: score it before the learner steps on it")
    return ref


def _check_length(shard: ShardRecord, what: str, found: int, wanted: int) -> None:
    if found != wanted:
        raise DataError(f"shard {shard.rollout.key} has {wanted} trajectories but {found} {what}: score it again")
