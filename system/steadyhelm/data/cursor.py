"""Which prompt comes when, as pure functions of counters: nothing here has state.

The data set is read as an endless stream of epochs: stream position p is epoch p // N, rank p % N, and each epoch has
its own order. Iteration i (from 1) takes the positions [(i − 1)·n, i·n). Swaps and seeds are hashes of the same
counters, so any process at any time computes the same prompts.
"""

from __future__ import annotations

import re
import struct
from dataclasses import dataclass, replace

import numpy as np
import xxhash
from numpy.typing import NDArray

from steadyhelm.data.permutation import permutation
from steadyhelm.data.types import PromptId

_ID = re.compile(r"(\d+):(\d+)(?:s(\d+))?(?:r(\d+))?")
_SEED, _SWAP, _HELD_OUT = 1, 2, 3  # domains of the counter hash: equal counters of different purposes stay independent


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """What a prompt id says: record ``index`` of the data set in ``epoch``, which sample of it, which retry.

    ``sample`` is None where a prompt has one sample only.

    Example: ``Place(epoch=0, index=17, sample=3, retry=1)``, whose id is ``"0:17s3r1"`` and whose group is ``"0:17"``
    """

    epoch: int
    index: int
    sample: int | None = None
    retry: int = 0

    @property
    def group_id(self) -> str:
        """The id that all samples and retries of this prompt share."""
        return f"{self.epoch}:{self.index}"

    @property
    def prompt_id(self) -> PromptId:
        """The prompt's id: ``"<epoch>:<index>[s<sample>][r<retry>]"``."""
        sample = "" if self.sample is None else f"s{self.sample}"
        return PromptId(f"{self.group_id}{sample}{f'r{self.retry}' if self.retry else ''}")

    @property
    def next_try(self) -> Place:
        """The same prompt with its retry counted up."""
        return replace(self, retry=self.retry + 1)


def parse_prompt_id(prompt_id: str) -> Place:
    """The place that ``prompt_id`` names. Raises ValueError for anything but a training prompt's id."""
    match = _ID.fullmatch(prompt_id)
    if match is None:
        raise ValueError(f"{prompt_id!r} is not a training prompt's id: it looks like '0:17', '0:17s3' or '0:17s3r1'")
    epoch, index, sample, retry = match.groups()
    return Place(
        epoch=int(epoch),
        index=int(index),
        sample=None if sample is None else int(sample),
        retry=0 if retry is None else int(retry),
    )


def epoch_order(seed: int, epoch: int, num_records: int, *, shuffle: bool = True) -> NDArray[np.int64]:
    """The records' order in ``epoch``: the permutation [N] of 0 … N−1 that is keyed by (seed, epoch).

    Without ``shuffle`` every epoch has the data set's own order.
    """
    if not shuffle:
        return np.arange(num_records, dtype=np.int64)
    return permutation(num_records, (seed, epoch))


def iteration_places(
    iteration: int, prompts_per_iteration: int, num_records: int, seed: int, *, shuffle: bool = True
) -> tuple[Place, ...]:
    """The places of ``iteration`` (from 1), in stream order, one per prompt, ``sample`` None.

    Positions [(i − 1)·n, i·n) of the endless stream of epochs. Raises ValueError for an iteration below 1 or an empty
    data set.
    """
    if iteration < 1 or num_records < 1:
        raise ValueError(f"iteration {iteration} of {num_records} records: both must be at least 1")
    positions = range((iteration - 1) * prompts_per_iteration, iteration * prompts_per_iteration)
    first, last = positions[0] // num_records, positions[-1] // num_records
    orders = {epoch: epoch_order(seed, epoch, num_records, shuffle=shuffle) for epoch in range(first, last + 1)}
    return tuple(
        Place(epoch=position // num_records, index=int(orders[position // num_records][position % num_records]))
        for position in positions
    )


def is_swapped(seed: int, epoch: int, index: int) -> bool:
    """Whether the two responses of record ``index`` change places in ``epoch``: probability ½.

    All samples and retries of a prompt share the decision.
    """
    return _hash63(_SWAP, seed, epoch, index) >> 62 == 1


def sampling_seed(seed: int, place: Place) -> int:
    """The 63-bit seed of one completion: a hash of (run seed, epoch, index, sample, retry)."""
    return _hash63(_SEED, seed, place.epoch, place.index, place.sample or 0, place.retry)


def held_out_seed(seed: int, index: int, swapped: bool) -> int:
    """The 63-bit seed of one evaluation completion: a hash of (run seed, index, order)."""
    return _hash63(_HELD_OUT, seed, index, int(swapped))


def _hash63(*counters: int) -> int:
    return xxhash.xxh3_64_intdigest(struct.pack(f"<{len(counters)}q", *counters)) >> 1
