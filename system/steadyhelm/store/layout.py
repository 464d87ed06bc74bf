"""The names of a run's objects, and what a name says.

::

    images/<sha256>                                             each image once, shared by runs
    <run>/run.json                                              the validated run file that the run began with
    <run>/log/<seq:08d>                                         the commit log
    <run>/batches/<iteration:06d>/<attempt>-<shard:04d>.<kind>  rollout, reference and reward shards
    <run>/weights/<iteration:06d>.<attempt>/…                   a published policy version
    <run>/checkpoints/<iteration:06d>.<attempt>/…               a saved learner state
    <run>/metrics/<attempt>-<n>.jsonl                           metrics in segments
    <run>/eval/<iteration:06d>/<attempt>-<shard:04d>.rollout    completions of an evaluation
    <run>/report/…, <run>/model/…                               the report; the final model folder
    <run>/start/…                                               the starting point where a factory made it
    <run>/status.json                                           where the last driver left the run
    <run>/lease, <run>/probe/…                                  who drives the run; traces of a race at the start

A number that outgrows its width is written whole; ``parse`` reads it all the same, but names then no longer sort.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal, cast, get_args

from steadyhelm.config.place import IMAGES, check_run_id
from steadyhelm.data.types import ImageKey, PolicyVersion
from steadyhelm.errors import StoreError

ShardKind = Literal["rollout", "reference", "reward"]
"""What a shard holds: trajectories, log-probs of the frozen model, or scores."""

_SHARD = re.compile(r"(batches|eval)/(\d{6,})/(\d+)-(\d{4,})\.(rollout|reference|reward)")
_VERSION = re.compile(r"(?:weights|checkpoints)/(\d{6,})\.(\d+)(?:/.*)?")


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardName:
    """What the key of a shard says. ``evaluation`` is True under ``eval/``.

    Example: ``ShardName(iteration=12, attempt=1, shard=0, kind="rollout")``
    """

    iteration: int
    attempt: int
    shard: int
    kind: ShardKind
    evaluation: bool = False


@dataclass(frozen=True, slots=True)
class RunLayout:
    """Keys of the objects of ``run``. Raises ConfigError for a run name that is no single part of a key.

    Example: ``RunLayout("digits").shard(12, 1, 0, "rollout") == "digits/batches/000012/1-0000.rollout"``
    """

    run: str

    def __post_init__(self) -> None:
        check_run_id(self.run)

    @property
    def run_file(self) -> str:
        """Key of the validated run file."""
        return f"{self.run}/run.json"

    @property
    def log_prefix(self) -> str:
        """Prefix of the commit log's entries."""
        return f"{self.run}/log/"

    @property
    def report(self) -> str:
        """Prefix of the run report, without a slash behind."""
        return f"{self.run}/report"

    @property
    def model(self) -> str:
        """Prefix of the final model folder, without a slash behind."""
        return f"{self.run}/model"

    @property
    def metrics_prefix(self) -> str:
        """Prefix of the metrics segments."""
        return f"{self.run}/metrics/"

    @property
    def start(self) -> str:
        """Prefix of the starting point's model folder where a factory made it, without a slash behind."""
        return f"{self.run}/start"

    @property
    def status(self) -> str:
        """Key of the status in which the last driver left the run."""
        return f"{self.run}/status.json"

    @property
    def lease(self) -> str:
        """Key of the driver's lease, in a store without locks."""
        return f"{self.run}/lease"

    @property
    def probe_prefix(self) -> str:
        """Prefix of the objects that a start races for; they are deleted again."""
        return f"{self.run}/probe/"

    def log_entry(self, seq: int) -> str:
        """Key of the ``seq``-th entry of the commit log, from 1."""
        return f"{self.log_prefix}{seq:08d}"

    def shard(self, iteration: int, attempt: int, shard: int, kind: ShardKind) -> str:
        """Key of a shard of an iteration's batch."""
        return f"{self.run}/batches/{iteration:06d}/{attempt}-{shard:04d}.{kind}"

    def eval_shard(self, iteration: int, attempt: int, shard: int) -> str:
        """Key of a rollout shard of the evaluation after ``iteration``."""
        return f"{self.run}/eval/{iteration:06d}/{attempt}-{shard:04d}.rollout"

    def weights(self, version: PolicyVersion) -> str:
        """Prefix of a published policy version, without a slash behind."""
        return f"{self.run}/weights/{version.iteration:06d}.{version.attempt}"

    def checkpoint(self, version: PolicyVersion) -> str:
        """Prefix of a saved learner state, without a slash behind."""
        return f"{self.run}/checkpoints/{version.iteration:06d}.{version.attempt}"

    def metrics(self, attempt: int, segment: int) -> str:
        """Key of a segment of the attempt's metrics."""
        return f"{self.metrics_prefix}{attempt}-{segment}.jsonl"

    def parse_shard(self, key: str) -> ShardName:
        """What the key of a shard says. Raises StoreError for another key."""
        folder, iteration, attempt, shard, kind = self._match(_SHARD, key, "a shard")
        return ShardName(
            iteration=int(iteration),
            attempt=int(attempt),
            shard=int(shard),
            kind=cast(ShardKind, kind),
            evaluation=folder == "eval",
        )

    def parse_version(self, key: str) -> PolicyVersion:
        """The policy version that an object of weights or of a checkpoint belongs to. Raises StoreError."""
        iteration, attempt = self._match(_VERSION, key, "weights or a checkpoint")
        return PolicyVersion(iteration=int(iteration), attempt=int(attempt))

    def _match(self, pattern: re.Pattern[str], key: str, what: str) -> tuple[str, ...]:
        run, _, rest = key.partition("/")
        match = pattern.fullmatch(rest)
        if run != self.run or match is None:
            raise StoreError(
                f"{key!r} is not the key of {what} of run {self.run!r}: nothing of Steadyhelm put it there"
            )
        return cast(tuple[str, ...], match.groups())


def image_key(sha256: str) -> ImageKey:
    """The key of the image whose encoded bytes have that SHA-256 in lower-case hex."""
    return ImageKey(f"{IMAGES}/{sha256}")


SHARD_KINDS: tuple[ShardKind, ...] = get_args(ShardKind)
