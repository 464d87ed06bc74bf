import json
from pathlib import Path

import numpy as np
import pytest
from steadyhelm.config import RunFile
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
from steadyhelm.errors import ConfigError
from steadyhelm.report import gather, read_metrics, write_report
from steadyhelm.report.gather import picks, pieces
from steadyhelm.store import ObjectStore, open_store
from steadyhelm.store.codec import encode_rewards, encode_rollout
from steadyhelm.store.images import put_image
from steadyhelm.store.layout import RunLayout
from steadyhelm.store.log import CommitLog
from steadyhelm.telemetry import MetricsLog

RUN = "digits-transformers"
LAYOUT = RunLayout(RUN)
PNG = b"\x89PNG\r\n\x1a\n0123"
WORDS = ["<think>", "five", "</think>", "<answer>", "1", "2", "</answer>", "<|im_end|>"]
RUN_FILE = RunFile.model_validate(
    {
        "name": "digits",
        "model": {"path": "nowhere"},
        "data": {"train": "task.py:train"},
        "schedule": {"iterations": 2, "prompts_per_iteration": 4},
        "learner": {"train_batch": 4},
    }
)


@pytest.fixture
def store(tmp_path: Path) -> ObjectStore:
    return open_store(str(tmp_path))


def trajectory(store: ObjectStore, index: int, answer: int, swapped: bool = False) -> Trajectory:
    ids = [0, 1, 2, 3, 3 + answer, 6, 7]
    prompt = Prompt(
        prompt_id=PromptId(f"0:{index}"),
        group_id=f"0:{index}",
        text=f"question {index}",
        images=(put_image(store, PNG),),
        label=2,
        swapped=swapped,
        seed=index,
        pair_id=f"pair-{index}",
        meta={"topic": f"topic {index}"},
    )
    return Trajectory(
        prompt=prompt,
        prompt_tokens=np.array([0, 1], np.int32),
        tokens=np.array(ids, np.int32),
        logprobs=np.full(7, np.log(0.5), np.float32),
        versions=np.zeros(7, np.int32),
        attempt=1,
        finish=FinishReason.STOP,
        completion_text="".join(WORDS[i] for i in ids[:-1]),
    )


def commit(store: ObjectStore, log: CommitLog, iteration: int) -> None:
    trajectories = [trajectory(store, i, 2 if i < 2 else 1) for i in range(4)]
    total = np.array([2.0, 2.0, 0.5, np.nan], np.float32)
    valid = np.array([True, True, True, False])
    rewards = Rewards(
        total=total,
        valid=valid,
        components={"choice": np.array([1, 1, 0, np.nan], np.float32)},
        detail=({"choice": 2}, {"choice": 2}, {"choice": 1}, {"error": "brevity: it returned None: no score"}),
    )
    shard = ShardRecord(
        shard=0,
        rollout=store.put(LAYOUT.shard(iteration, 1, 0, "rollout"), encode_rollout(trajectories)),
        prompt_ids=tuple(t.prompt.prompt_id for t in trajectories),
        num_tokens=28,
        min_version=0,
        max_version=0,
        attempt=1,
        reward=store.put(LAYOUT.shard(iteration, 1, 0, "reward"), encode_rewards(rewards)),
        valid=(True, True, True, False),
    )
    outcomes = dict.fromkeys(shard.prompt_ids, "trained")
    policy = PolicyVersion(iteration=iteration - 1, attempt=1)
    log.commit_batch(BatchManifest(iteration=iteration, policy=policy, shards=(shard,), outcomes=outcomes))


def evaluate(store: ObjectStore, log: CommitLog, iteration: int, right: set[int]) -> None:
    answers = [trajectory(store, i, 2 if i in right else 1, swapped) for i in range(3) for swapped in (False, True)]
    store.put(LAYOUT.eval_shard(iteration, 1, 0), encode_rollout(answers[:4]))
    store.put(LAYOUT.eval_shard(iteration, 1, 1), encode_rollout(answers[4:]))
    metrics = {"eval/accuracy": len(right) / 3}
    log.append("eval", {"iteration": iteration, "attempt": 1, "metrics": metrics})


def make_run(store: ObjectStore) -> None:
    record = {"format": 1, "steadyhelm": "0.1.0", "run": RUN_FILE.model_dump(mode="json")}
    store.put(LAYOUT.run_file, json.dumps(record).encode())
    log = CommitLog.take_over(store, RUN, "start")
    metrics = MetricsLog(store.put, LAYOUT.metrics_prefix, 1)
    evaluate(store, log, 0, right={0})
    for iteration in (1, 2):
        commit(store, log, iteration)
        metrics.append(iteration, {"reward/mean": iteration / 2})
    evaluate(store, log, 2, right={0, 1})
    metrics.flush()


def put_tokenizer(store: ObjectStore) -> None:
    from tokenizers import Tokenizer, decoders, models

    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="five"))
    tokenizer.decoder = decoders.Fuse()
    store.put(f"{LAYOUT.model}/tokenizer.json", tokenizer.to_str().encode())


def test_a_run_is_gathered_from_what_its_log_names(store: ObjectStore):
    make_run(store)
    put_tokenizer(store)
    data = gather(store, RUN)
    assert (data.run, data.attempts, data.versions) == (RUN, 1, {"steadyhelm": "0.1.0"})
    assert [(line.iteration, line.metrics) for line in data.metrics] == [
        (1, {"reward/mean": 0.5}),
        (2, {"reward/mean": 1.0}),
    ]
    assert [(e.iteration, e.metrics["eval/accuracy"]) for e in data.evaluations] == [(0, 1 / 3), (2, 2 / 3)]
    shown = [(s.iteration, s.prompt_id, s.why, s.reward, s.parts, s.correct) for s in data.samples]
    assert shown[:3] == [
        (1, "0:1", "highest reward", 2.0, {"choice": 1.0}, True),
        (1, "0:2", "lowest reward", 0.5, {"choice": 0.0}, False),
        (1, "0:0", "median reward", 2.0, {"choice": 1.0}, True),
    ]
    assert shown[3][:4] == (1, "0:3", "unscored", None)
    assert [(s.detail, s.meta) for s in data.samples[2:4]] == [
        ({"choice": 2}, {"topic": "topic 0"}),
        ({"error": "brevity: it returned None: no score"}, {"topic": "topic 3"}),
    ]
    assert len(shown) == 8
    best = data.samples[0]
    assert [token.text for token in best.tokens] == ["<think>", "five", "</think>", "<answer>", "2", "</answer>", "⏎"]
    # z of {2, 2, 0.5} with equal lengths: mean 1.5, deviation 0.70710678
    assert best.tokens[0].advantage == pytest.approx(0.70710677)
    assert best.tokens[0].probability == pytest.approx(0.5)
    assert best.images == (PNG,)
    assert data.samples[3].tokens[0].advantage is None


def test_the_same_held_out_prompts_before_and_after(store: ObjectStore):
    make_run(store)
    data = gather(store, RUN)
    assert data.changes == {(True, True): 2, (False, True): 2, (False, False): 2}
    kinds = [(item.before.correct, item.after.correct) for item in data.comparisons]
    assert kinds == [(False, True), (True, True), (False, False)] * 2
    assert all(item.before.prompt == item.after.prompt for item in data.comparisons)
    assert {item.after.meta["topic"] for item in data.comparisons} == {"topic 0", "topic 1", "topic 2"}


def test_without_a_tokenizer_a_completion_is_one_piece_and_the_page_says_so(store: ObjectStore):
    make_run(store)
    data = gather(store, RUN)
    (only,) = data.samples[0].tokens
    assert only.text == "<think>five</think><answer>2</answer>"
    assert only.advantage == pytest.approx(0.70710677)
    assert "The tokenizer was not found, so completions are not split into tokens." in data.notes


def test_the_report_is_put_beside_the_run(store: ObjectStore):
    make_run(store)
    assert write_report(store, RUN) == f"{RUN}/report/report.html"
    assert "&lt;answer&gt;2&lt;/answer&gt;" in bytes(store.get(f"{RUN}/report/report.html")).decode()


def test_a_run_that_does_not_exist_is_an_error(store: ObjectStore):
    with pytest.raises(ConfigError, match="there is no run 'nothing'"):
        gather(store, "nothing")


def test_metrics_of_a_later_attempt_win(store: ObjectStore):
    for attempt, value in ((1, 0.5), (2, 0.75)):
        log = MetricsLog(store.put, LAYOUT.metrics_prefix, attempt)
        log.append(1, {"reward/mean": value})
        log.flush()
    assert [line.metrics["reward/mean"] for line in read_metrics(store, RUN)] == [0.75]


def test_a_sample_is_picked_once_for_its_first_reason():
    total = np.array([1.0, np.nan, 1.0], np.float32)
    assert picks(total, np.array([True, False, True]), [True, False, False]) == {
        2: "highest reward",
        0: "lowest reward",
        1: "unscored",
    }


def test_a_sample_that_was_dropped_as_too_old_is_not_called_unscored():
    total = np.array([1.0, 2.0, np.nan], np.float32)
    stale = np.array([False, True, False])
    assert picks(total, np.array([True, False, False]), [False] * 3, stale) == {
        0: "highest reward",
        1: "dropped: too old",
        2: "unscored",
    }


def test_a_character_of_several_tokens_is_shown_at_the_last_of_them():
    parts = {1: b"a", 2: "é".encode()[:1], 3: "é".encode()[1:], 4: b"b"}

    def decode(ids):
        return b"".join(parts[i] for i in ids).decode(errors="replace")

    assert pieces([1, 2, 3, 4], decode) == ["a", "", "é", "b"]
    assert pieces([1, 2], decode) == ["a", "\ufffd"]
