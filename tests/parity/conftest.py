"""Learner groups of one and of two ranks, run once for all parity tests."""

import io
import json
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from steadyhelm.data.types import (
    BatchManifest,
    FinishReason,
    PolicyVersion,
    Prompt,
    PromptId,
    Rewards,
    ShardRecord,
    Trajectory,
)
from steadyhelm.models.encoder import PromptEncoder
from steadyhelm.store import open_store
from steadyhelm.store.codec import encode_reference, encode_rewards, encode_rollout
from steadyhelm.store.images import get_image, put_image
from steadyhelm.store.records import to_json

ROWS, UNSCORED, ABORTED = 12, 4, 9
SHARDS = (slice(0, 7), slice(7, ROWS))


@dataclass(frozen=True)
class Iteration:
    """One iteration's batch in plain records; ``counts`` are the rows that are scored and not aborted."""

    trajectories: list
    rewards: Rewards
    reference: list


@dataclass(frozen=True)
class Inputs:
    """What every learner of these tests is given."""

    store: object
    model: Path
    encoder: PromptEncoder
    iterations: dict


@dataclass(frozen=True)
class Group:
    """The answers of the groups: ``answers[world size][case]`` has one answer per operation."""

    inputs: Inputs
    answers: dict
    other_rank: dict


def picture(rng, side):
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(rng.integers(0, 255, (side, side, 3), dtype=np.uint8)).save(buffer, format="PNG")
    return buffer.getvalue()


def make_iteration(number, store, encoder):
    """Twelve trajectories: with no, one or two images, of unequal length, one unscored and one aborted."""
    rng = np.random.default_rng(number)
    legal = np.setdiff1d(np.arange(encoder.vocab_size), np.asarray(encoder.banned_ids))
    trajectories, reference = [], []
    for row in range(ROWS):
        images = tuple(put_image(store, picture(rng, (56, 84)[row % 2])) for _ in range((1, 1, 0, 2)[row % 4]))
        length = int(rng.integers(1, 10))
        tokens = rng.choice(legal, length).astype(np.int32)
        logprobs = -rng.uniform(4.0, 7.0, length).astype(np.float32)
        prompt = Prompt(
            prompt_id=PromptId(f"{number}:{row}"),
            group_id=f"{number}:{row // 2}",
            text="Is it 3 or 5?",
            images=images,
            label=1,
            swapped=False,
            seed=row,
        )
        trajectories.append(
            Trajectory(
                prompt=prompt,
                prompt_tokens=encoder.encode("Which is it? " * (1 + row % 3), images),
                tokens=tokens,
                logprobs=logprobs,
                versions=np.full(length, number - 1, np.int32),
                attempt=1,
                finish=FinishReason.ABORT if row == ABORTED else FinishReason.STOP if row % 2 else FinishReason.LENGTH,
                completion_text="",
            )
        )
        reference.append(logprobs + rng.normal(0.0, 0.3, length).astype(np.float32))
    total = rng.choice([2.0, 1.5, 0.5, 0.0], ROWS).astype(np.float32)
    valid = np.arange(ROWS) != UNSCORED
    total[UNSCORED] = np.nan
    return Iteration(
        trajectories,
        Rewards(total=total, valid=valid, components={"choice": total}, detail=tuple({} for _ in range(ROWS))),
        reference,
    )


def put_iteration(name, number, iteration, store):
    """Stores the batch in two shards; returns its manifest."""
    shards = []
    for index, rows in enumerate(SHARDS):
        part, scores = iteration.trajectories[rows], iteration.rewards
        rewards = Rewards(
            total=scores.total[rows],
            valid=scores.valid[rows],
            components={"choice": scores.total[rows]},
            detail=scores.detail[rows],
        )
        key = f"test/batches/{name}/1-{index:04d}"
        shards.append(
            ShardRecord(
                shard=index,
                rollout=store.put(f"{key}.rollout", encode_rollout(part)),
                prompt_ids=tuple(row.prompt.prompt_id for row in part),
                num_tokens=sum(len(row.tokens) for row in part),
                min_version=number - 1,
                max_version=number - 1,
                attempt=1,
                reward=store.put(f"{key}.reward", encode_rewards(rewards)),
                reference=store.put(f"{key}.reference", encode_reference(iteration.reference[rows])),
                valid=tuple(bool(flag) for flag in rewards.valid),
            )
        )
    return BatchManifest(
        iteration=number, policy=PolicyVersion(iteration=number - 1, attempt=1), shards=tuple(shards), outcomes={}
    )


def broken_rewards(iteration):
    """Row 2 has a reward that is not a number but counts as scored."""
    total = iteration.rewards.total.copy()
    total[2] = np.nan
    rewards = Rewards(total=total, valid=iteration.rewards.valid, components={}, detail=iteration.rewards.detail)
    return Iteration(iteration.trajectories, rewards, iteration.reference)


def broken_logprobs(iteration):
    """Row 2's behaviour log-probs are not numbers."""
    import dataclasses

    rows = list(iteration.trajectories)
    rows[2] = dataclasses.replace(rows[2], logprobs=np.full_like(rows[2].logprobs, np.nan))
    return Iteration(rows, iteration.rewards, iteration.reference)


@pytest.fixture(scope="session")
def inputs(tiny_model, tmp_path_factory):
    store = open_store(str(tmp_path_factory.mktemp("learner") / "store"))
    encoder = PromptEncoder(tiny_model, min_pixels=3136, max_pixels=501760, fetch=lambda key: get_image(store, key))
    iterations = {number: make_iteration(number, store, encoder) for number in (1, 2)}
    return Inputs(store, tiny_model, encoder, iterations)


def launch(folder, world_size, deadline_s=240.0):
    """Runs the script in ``folder`` on ``world_size`` ranks; returns rank 0's and the last rank's answers."""
    script = Path(__file__).with_name("learner_ranks.py")
    logs = [folder / f"printed-{world_size}-{rank}.txt" for rank in range(world_size)]
    ranks = []
    for rank, log in enumerate(logs):
        with log.open("w") as out:
            command = [sys.executable, str(script), str(folder), str(rank), str(world_size)]
            ranks.append(subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT))
    end = time.monotonic() + deadline_s
    try:
        # a rank that fails leaves the others waiting for it in a collective
        while time.monotonic() < end and not any(rank.poll() for rank in ranks):
            if all(rank.poll() == 0 for rank in ranks):
                break
            time.sleep(0.05)
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()
    printed = "".join(log.read_text() for log in logs)
    assert [rank.returncode for rank in ranks] == [0] * world_size, printed
    assert printed == ""  # neither DeepSpeed's banners nor warnings reach the user
    name = f"answers-{world_size}"
    first = json.loads((folder / f"{name}.json").read_text())
    last = json.loads((folder / f"{name}-rank{world_size - 1}.json").read_text()) if world_size > 1 else first
    return first, last


@pytest.fixture(scope="session")
def group(inputs, tmp_path_factory):
    sys.path.insert(0, str(Path(__file__).parent))
    from learner_cases import cases

    folder = tmp_path_factory.mktemp("group")
    first = inputs.iterations[1]
    manifests = {
        "1": put_iteration("000001", 1, first, inputs.store),
        "2": put_iteration("000002", 2, inputs.iterations[2], inputs.store),
        "nan-reward": put_iteration("nan-reward", 1, broken_rewards(first), inputs.store),
        "nan-logprobs": put_iteration("nan-logprobs", 1, broken_logprobs(first), inputs.store),
    }
    script = {
        "store": inputs.store.uri,
        "model": str(inputs.model),
        "manifests": {name: to_json(manifest) for name, manifest in manifests.items()},
        "cases": cases(),
    }
    (folder / "script.json").write_text(json.dumps(script))
    answers, others = {}, {}
    for world_size in (1, 2):
        answers[world_size], others[world_size] = launch(folder, world_size)
    return Group(inputs, answers, others[2])
