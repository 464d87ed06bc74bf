"""The learner's step against a bare PyTorch loop that does the same step.

The learner is what runs inside a rank, in this process: DeepSpeed, the batch read from the store. The hop through Ray
Train's group and its mailbox, one command and one answer per iteration, is not in it; ``overhead.py`` bounds it,
together with all else in a real run's iteration that does not compute. On one rank in float32 the learner leaves ZeRO
out, whatever stage the run file names (docs/design/0017): that is the figure with a goal. The stages follow as they
cost where they are kept nevertheless.
"""

from __future__ import annotations

import importlib
import math
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

os.environ |= {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": os.environ.get("DS_ACCELERATOR", "cpu")}
os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_SIZE": "1", "TOKENIZERS_PARALLELISM": "false"}
ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "workloads" / "r1_reward"), str(ROOT / "benchmarks")]

import numpy as np  # noqa: E402
import policies  # noqa: E402
import torch  # noqa: E402
from steadyhelm.algorithms.minibatches import minibatches  # noqa: E402
from steadyhelm.config import RunFile  # noqa: E402
from steadyhelm.data.types import (  # noqa: E402
    BatchManifest,
    FinishReason,
    PolicyVersion,
    Prompt,
    PromptId,
    Rewards,
    ShardRecord,
    Trajectory,
)
from steadyhelm.models.batch import ModelBatch, TokenSequence, collate  # noqa: E402
from steadyhelm.models.encoder import PromptEncoder  # noqa: E402
from steadyhelm.models.load import load_model  # noqa: E402
from steadyhelm.models.logprobs import completion_logprobs  # noqa: E402
from steadyhelm.services.learner import LearnerRank, LearnerSpec  # noqa: E402
from steadyhelm.store import ObjectStore, open_store  # noqa: E402
from steadyhelm.store.codec import encode_rewards, encode_rollout  # noqa: E402
from steadyhelm.store.images import get_image, put_image  # noqa: E402
from table import Row, main  # noqa: E402

GOAL = 0.95


@dataclass(frozen=True, slots=True, kw_only=True)
class Size:
    """A model and a batch. ``model`` overrides constants of ``tiny_model``."""

    name: str
    model: dict[str, int]
    rows: int
    train_batch: int
    micro_batch: int


TINY = Size(name="digits model", model={}, rows=256, train_batch=128, micro_batch=32)
"""As ``digits.yaml`` has it."""
LARGER = Size(
    name="hidden 512, 6 layers",
    model={"HIDDEN": 512, "LAYERS": 6, "HEADS": 16, "KEY_VALUE_HEADS": 8},
    rows=32,
    train_batch=16,
    micro_batch=8,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """What both loops are given: a model folder, trajectories with rewards, and the store that holds the same."""

    size: Size
    folder: Path
    store: ObjectStore
    trajectories: list[Trajectory]
    totals: np.ndarray[Any, np.dtype[np.float32]]
    manifest: BatchManifest

    def run(self, zero_stage: int) -> RunFile:
        """The run file."""
        size = self.size
        return RunFile.model_validate(
            {
                "name": "learner-benchmark",
                "model": {"path": str(self.folder), "dtype": "float32"},
                "data": {"train": "digits.py:train_pairs"},
                "learner": {
                    "zero_stage": zero_stage,
                    "train_batch": size.train_batch,
                    "micro_batch": size.micro_batch,
                    "lr": 1e-5,
                },
                "schedule": {"iterations": 1000, "prompts_per_iteration": size.rows},
            }
        )

    def encoder(self) -> PromptEncoder:
        """The encoder of the model folder."""
        return PromptEncoder(
            self.folder, min_pixels=3136, max_pixels=501760, fetch=lambda key: get_image(self.store, key)
        )


@contextmanager
def prepared(size: Size) -> Iterator[Setting]:
    """The digits task's prompts with its traces as completions, in a temporary folder."""
    digits = importlib.import_module("digits")
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "model"
        policies.build(folder, constants=size.model)
        store = open_store(str(Path(scratch) / "store"))
        encoder = PromptEncoder(folder, min_pixels=3136, max_pixels=501760, fetch=lambda key: get_image(store, key))
        trajectories = [_trajectory(n, pair, encoder, store) for n, pair in enumerate(digits.sft_pairs()[: size.rows])]
        totals = np.random.default_rng(0).choice(np.array([2.0, 0.5], np.float32), size.rows)
        rewards = Rewards(
            total=totals, valid=np.ones(size.rows, np.bool_), components={}, detail=tuple({} for _ in totals)
        )
        shard = ShardRecord(
            shard=0,
            rollout=store.put("benchmark/0.rollout", encode_rollout(trajectories)),
            prompt_ids=tuple(row.prompt.prompt_id for row in trajectories),
            num_tokens=sum(len(row.tokens) for row in trajectories),
            min_version=0,
            max_version=0,
            attempt=1,
            reward=store.put("benchmark/0.reward", encode_rewards(rewards)),
        )
        manifest = BatchManifest(
            iteration=1, policy=PolicyVersion(iteration=0, attempt=1), shards=(shard,), outcomes={}
        )
        yield Setting(
            size=size, folder=folder, store=store, trajectories=trajectories, totals=totals, manifest=manifest
        )


def _trajectory(number: int, pair: Any, encoder: PromptEncoder, store: ObjectStore) -> Trajectory:
    images = tuple(put_image(store, image) for image in pair.images)
    text = f"{pair.question} Response 1: {pair.responses[0]} Response 2: {pair.responses[1]}"
    tokens = encoder.encode_completion(pair.trace)
    prompt = Prompt(
        prompt_id=PromptId(f"0:{number}"),
        group_id=f"0:{number}",
        text=text,
        images=images,
        label=pair.label,
        swapped=False,
        seed=number,
    )
    return Trajectory(
        prompt=prompt,
        prompt_tokens=encoder.encode(text, images),
        tokens=tokens,
        logprobs=np.full(len(tokens), -1.0, np.float32),
        versions=np.zeros(len(tokens), np.int32),
        attempt=1,
        finish=FinishReason.STOP,
        completion_text=pair.trace,
    )


class BareLoop:
    """The same StableReinforce step on trajectories in memory, as one would write it by hand for one process."""

    def __init__(self, setting: Setting) -> None:
        self._setting = setting
        self._run = setting.run(2)
        self._encoder = setting.encoder()
        self._model = load_model(setting.folder, dtype="float32").train()
        learner = self._run.learner
        self._optimizer = torch.optim.AdamW(
            self._model.parameters(),
            lr=learner.lr,
            betas=learner.betas,
            eps=learner.eps,
            weight_decay=learner.weight_decay,
            fused=True,
        )

    def _collate(self, rows: Sequence[int]) -> ModelBatch:
        return collate([TokenSequence.of(self._setting.trajectories[row]) for row in rows], self._encoder)

    def _logprobs(self, batch: ModelBatch) -> tuple[torch.Tensor, torch.Tensor]:
        logprobs, _, mask = completion_logprobs(
            self._model, batch, temperature=1.0, banned_ids=self._encoder.banned_ids
        )
        return logprobs, mask

    def _micro_batches(self, rows: Sequence[int]) -> list[list[int]]:
        of = self._setting.trajectories
        order = sorted(rows, key=lambda row: (len(of[row].prompt_tokens) + len(of[row].tokens), row))
        size = self._setting.size.micro_batch
        return [order[start : start + size] for start in range(0, len(order), size)]

    def step(self) -> None:
        """All optimiser steps of the iteration."""
        size = self._setting.size
        steps = [
            self._micro_batches([int(row) for row in rows])
            for rows in minibatches(size.rows, size.train_batch, 0, 1, 0)
        ]
        lengths = torch.tensor([float(len(row.tokens)) for row in self._setting.trajectories])
        totals = torch.from_numpy(self._setting.totals)
        mean = (totals * lengths).sum() / lengths.sum()
        std = (((totals - mean) ** 2 * lengths).sum() / lengths.sum()).sqrt()
        advantages = (totals - mean) / (std + 1e-8)
        advantages = torch.where(advantages.abs() <= 3.0, advantages, 0.0)
        proximal: dict[int, torch.Tensor] = {}
        with torch.no_grad():
            for micro_batches in steps[1:]:
                for rows in micro_batches:
                    proximal[rows[0]] = self._logprobs(self._collate(rows))[0]
        for micro_batches in steps:
            for rows in micro_batches:
                current, mask = self._logprobs(self._collate(rows))
                ratio = (current - proximal.get(rows[0], current.detach())).clamp(-math.log(1e3), math.log(1e3)).exp()
                weight = advantages[rows][:, None]
                gain = torch.minimum(ratio * weight, ratio.clamp(0.8, 1.2) * weight)
                loss = -((gain * mask).sum(1) / mask.sum(1)).sum() / sum(map(len, micro_batches))
                loss.backward()  # type: ignore[no-untyped-call]
            torch.nn.utils.clip_grad_norm_(self._model.parameters(), 1.0)
            self._optimizer.step()
            self._optimizer.zero_grad()


def seconds(work: Callable[[], object]) -> float:
    """How long ``work`` takes."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def compare(size: Size, kept: Sequence[int], repeats: int) -> Iterator[Row]:
    """The learner as runs have it, then with each ZeRO stage of ``kept``; the loops take turns, one learner at a time.

    The ratio is the median over pairs of neighbours.
    """
    with prepared(size) as setting:
        bare = BareLoop(setting)
        tokens = sum(len(row.tokens) for row in setting.trajectories)
        for stage in (None, *kept):
            spec = LearnerSpec(
                run=setting.run(2 if stage is None else stage),
                model_folder=str(setting.folder),
                store_uri=setting.store.uri,
                exact_stage=stage is not None,
            )
            ours = partial(LearnerRank(spec, 0, 1).step, setting.manifest)
            bare.step()  # both warm up
            ours()
            rounds = [(seconds(bare.step), seconds(ours)) for _ in range(repeats)]
            if stage is None:
                best = tokens / min(theirs for theirs, _ in rounds)
                yield Row(
                    name=f"{size.name}: bare loop", value=best, unit="completion tokens/s", goal=None, better="higher"
                )
            yield Row(
                name=f"{size.name}: learner / bare loop"
                + ("" if stage is None else f", ZeRO {stage} although one rank"),
                value=statistics.median(theirs / mine for theirs, mine in rounds),
                unit="ratio",
                goal=GOAL if stage is None else None,
                better="higher",
            )


def measure(quick: bool) -> Sequence[Row]:
    """The rows of the table."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        torch.distributed.init_process_group("gloo", init_method=f"file://{scratch}/rendezvous", rank=0, world_size=1)
        try:
            rows = list(compare(TINY, () if quick else (1, 2, 3), 5 if quick else 15))
            return rows + list(compare(LARGER, () if quick else (2,), 3 if quick else 9))
        finally:
            torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(
        "Completion tokens per second of the learner's step (in this process: DeepSpeed and the store, no hop through "
        "Ray) against a bare PyTorch loop doing the same step without either; micro-batches alike, one thread.",
        measure,
    )
