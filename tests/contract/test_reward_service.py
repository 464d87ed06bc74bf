"""What a reward service does, over the real one: every failure of a user's term costs its own sample, nothing else."""

import asyncio
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import numpy as np
import psutil
import pytest
from steadyhelm.config.reward import ChoiceTerm, ConsistencyTerm, CustomTerm, FormatTerm, Reward
from steadyhelm.data.types import FinishReason, ObjectRef, Prompt, PromptId, ShardRecord, Trajectory
from steadyhelm.errors import ConfigError, CorruptObjectError, RetryableError
from steadyhelm.services.reward import RewardScorer
from steadyhelm.store import LocalStore
from steadyhelm.store.codec import decode_rewards, encode_rollout
from steadyhelm.telemetry import metrics as names

TERMS = """
    import os, sys, time
    from pathlib import Path

    def obedient(sample):
        deed = sample.meta.get("deed", "")
        if deed == "hang":
            while True:
                pass
        if deed == "hang_in_c":
            import re
            re.match("(a+)+$", "a" * 64 + "b")  # holds the interpreter's lock for ages
        if deed == "crash":
            time.sleep(0.3)  # who dies at once may be found dead before it is known whose sample it has
            os._exit(7)
        if deed == "leave":
            os._exit(0)
        if deed == "exit":
            sys.exit(1)
        if deed == "raise":
            raise RuntimeError("no luck")
        if deed == "nan":
            return float("nan")
        if deed == "none":
            return None
        if deed == "text":
            return "1.0"
        return 0.25

    class Longest:
        scope = "group"
        def score(self, samples):
            best = max(sample.num_tokens for sample in samples)
            return [float(sample.num_tokens == best) for sample in samples]

    class Whole:
        scope = "batch"
        def score(self, samples):
            return [1.0] * len(samples)
"""
OBEDIENT = CustomTerm(name="obedient", code="terms.py:obedient")


def trajectory(number: int, text: str = "", *, label: int = 1, swapped: bool = False, group: str = "", **meta: str):
    count = 3 + number
    return Trajectory(
        prompt=Prompt(
            prompt_id=PromptId(f"0:{number}"),
            group_id=group or f"0:{number}",
            text="Which is better?",
            images=(),
            label=label,
            swapped=swapped,
            seed=number,
            pair_id=f"pair-{number}",
            meta=meta,
        ),
        prompt_tokens=np.arange(4, dtype=np.int32),
        tokens=np.arange(count, dtype=np.int32),
        logprobs=np.zeros(count, np.float32),
        versions=np.zeros(count, np.int32),
        attempt=1,
        finish=FinishReason.STOP,
        completion_text=text or said(1, 1),
    )


def said(conclusion: int, answer: int) -> str:
    return f"<think>So Response {conclusion} is better.</think><answer>{answer}</answer>"


def put(store: LocalStore, trajectories: list[Trajectory], shard: int = 0) -> ShardRecord:
    ref = store.put(f"run/batches/000001/1-{shard:04d}.rollout", encode_rollout(trajectories))
    return ShardRecord(
        shard=shard,
        rollout=ref,
        prompt_ids=tuple(item.prompt.prompt_id for item in trajectories),
        num_tokens=sum(len(item.tokens) for item in trajectories),
        min_version=0,
        max_version=0,
        attempt=1,
    )


@pytest.fixture
def base(tmp_path: Path) -> Path:
    folder = tmp_path / "task"
    folder.mkdir()
    (folder / "terms.py").write_text(textwrap.dedent(TERMS))
    return folder


@pytest.fixture
def store(tmp_path: Path) -> LocalStore:
    return LocalStore(tmp_path / "store")


@pytest.fixture
async def scorer(base: Path, store: LocalStore) -> AsyncIterator[Callable[..., RewardScorer]]:
    made: list[RewardScorer] = []

    def make(*terms: object, group_size: int = 1, **options: object) -> RewardScorer:
        config = Reward(terms=terms, **options) if terms else Reward(**options)
        made.append(RewardScorer(config, base=base, store=store, group_size=group_size))
        return made[-1]

    yield make
    for item in made:
        await asyncio.to_thread(item.close)
    assert [child for child in psutil.Process().children() if "spawn_main" in " ".join(child.cmdline())] == []


async def test_a_shard_gets_its_rewards_beside_it_in_its_order(scorer, store):
    shard = put(
        store, [trajectory(0, said(1, 1)), trajectory(1, said(1, 2)), trajectory(2, said(2, 1)), trajectory(3, "1")]
    )
    served = await scorer().score(shard)
    ref, valid = served.value
    assert ref.key == "run/batches/000001/1-0000.reward"
    assert valid == (True, True, True, True)
    rewards = decode_rewards(store.read(ref))
    assert rewards.total.tolist() == [2.0, 0.5, 1.0, 0.0]
    assert rewards.components["consistency"].tolist() == [1, -1, -1, 0]
    assert rewards.detail[1]["choice"] == 2


async def test_metrics_are_means_over_valid_samples(scorer, store):
    served = await scorer().score(put(store, [trajectory(0, said(1, 1)), trajectory(1, said(1, 2))]))
    assert served.metrics == {
        names.REWARD_MEAN: 1.25,
        names.REWARD_STD: 0.75,
        names.REWARD_FORMAT: 1.0,
        names.REWARD_CHOICE: 0.5,
        names.REWARD_CONSISTENCY: 0.0,
        names.REWARD_VALID_RATE: 1.0,
    }
    assert [(span.service, span.name, span.computes) for span in served.spans] == [
        ("reward", "read", False),
        ("reward", "score", False),
        ("reward", "write", False),
    ]


async def test_a_swapped_prompt_is_scored_by_its_swapped_label(scorer, store):
    shard = put(store, [trajectory(0, said(2, 2), label=2, swapped=True), trajectory(1, said(2, 2), label=1)])
    ref, _ = (await scorer().score(shard)).value
    assert decode_rewards(store.read(ref)).total.tolist() == [2.0, 0.5]


async def test_scoring_twice_gives_the_same_object(scorer, store, base):
    shard = put(store, [trajectory(i, said(1, 1 + i % 2)) for i in range(8)])
    first = await scorer().score(shard)
    data = bytes(store.get(first.value[0].key))
    again = await scorer().score(shard)
    assert again.value == first.value
    assert again.metrics == first.metrics
    store.delete(first.value[0].key)
    fresh = await scorer().score(shard)
    assert fresh.value == first.value
    assert bytes(store.get(first.value[0].key)) == data


async def test_racing_calls_for_one_shard_agree(scorer, store):
    shard = put(store, [trajectory(i) for i in range(4)])
    one, two = scorer(OBEDIENT), scorer(OBEDIENT)
    answers = await asyncio.gather(one.score(shard), two.score(shard), one.score(shard))
    assert answers[0].value == answers[1].value == answers[2].value


async def test_every_deed_of_a_users_term_costs_its_own_sample_only(scorer, store):
    deeds = ["", "hang", "crash", "raise", "nan", "none", "text", "exit", "leave", "hang_in_c", ""]
    shard = put(store, [trajectory(i, **({"deed": deed} if deed else {})) for i, deed in enumerate(deeds)])
    service = scorer(FormatTerm(), ChoiceTerm(), ConsistencyTerm(), OBEDIENT, sample_deadline_s=3.0, workers=2)
    served = await service.score(shard)
    ref, valid = served.value
    assert valid == tuple(not deed for deed in deeds)
    rewards = decode_rewards(store.read(ref))
    assert rewards.total[[0, -1]].tolist() == [2.25, 2.25]
    assert np.isnan(rewards.total[1:-1]).all()
    assert np.isnan(rewards.components["obedient"][1:-1]).all()
    assert rewards.components["choice"].tolist() == [1.0] * len(deeds)
    errors = {deed: detail.get("error") for deed, detail in zip(deeds, rewards.detail, strict=True)}
    late = "obedient: it took longer than its deadline of 3 s, or its process ended without a word"
    assert errors == {
        "": None,
        "hang": late,
        "crash": "obedient: its process ended with code 7",
        "raise": "obedient: it failed at terms.py line 21: RuntimeError: no luck",
        "nan": "obedient: it returned nan; a finite number is needed",
        "none": "obedient: it returned None: no score",
        "text": "obedient: it returned '1.0' (str); a number is needed",
        "exit": "obedient: it failed at terms.py line 19: SystemExit: 1",
        "leave": late,
        "hang_in_c": late,
    }
    assert served.metrics[names.REWARD_VALID_RATE] == 2 / 11
    assert served.metrics[names.reward_part("obedient")] == 0.25
    assert (await service.score(put(store, [trajectory(0)], shard=1))).value[1] == (True,)


async def test_a_process_that_is_killed_while_idle_is_replaced(scorer, store):
    service = scorer(OBEDIENT)
    assert (await service.score(put(store, [trajectory(0)]))).value[1] == (True,)
    for child in psutil.Process().children():
        if "spawn_main" in " ".join(child.cmdline()):
            os.kill(child.pid, signal.SIGKILL)
    await asyncio.sleep(0.5)
    assert (await service.score(put(store, [trajectory(1)], shard=1))).value[1] == (True,)


async def test_a_group_term_is_scored_over_its_prompts_samples(scorer, store):
    shard = put(store, [trajectory(0, group="a"), trajectory(1, group="a"), trajectory(2, group="b")])
    term = CustomTerm(name="longest", code="terms.py:Longest")
    ref, valid = (await scorer(term, group_size=2).score(shard)).value
    assert valid == (True, True, False)
    assert decode_rewards(store.read(ref)).total[:2].tolist() == [0.0, 1.0]


async def test_a_damaged_shard_is_never_scored(scorer, store, tmp_path):
    shard = put(store, [trajectory(0)])
    wrong = ObjectRef(key=shard.rollout.key, num_bytes=shard.rollout.num_bytes, xxh3="0" * 32)
    record = ShardRecord(
        shard=0, rollout=wrong, prompt_ids=shard.prompt_ids, num_tokens=3, min_version=0, max_version=0, attempt=1
    )
    with pytest.raises(CorruptObjectError):
        await scorer().score(record)
    assert not store.exists("run/batches/000001/1-0000.reward")


async def test_terms_that_cannot_be_served_are_refused_at_the_start(scorer):
    with pytest.raises(ConfigError, match=r"terms\.py has no name 'absent'"):
        scorer(CustomTerm(name="a", code="terms.py:absent"))
    with pytest.raises(ConfigError, match="its scope is 'batch', but shards are scored one by one"):
        scorer(CustomTerm(name="a", code="terms.py:Whole"))
    with pytest.raises(ConfigError, match="a single replaced sample would stand without its group"):
        scorer(CustomTerm(name="a", code="terms.py:Longest"), on_unscored="resample")


async def test_closing_ends_a_call_in_flight_which_puts_nothing(base, store):
    service = RewardScorer(Reward(terms=(OBEDIENT,), sample_deadline_s=60), base=base, store=store)
    call = asyncio.create_task(service.score(put(store, [trajectory(0, deed="hang")])))
    await asyncio.sleep(2.0)
    assert not call.done()
    await asyncio.to_thread(service.close)
    with pytest.raises(RetryableError, match="reward term 'obedient' was being scored when its service closed"):
        await asyncio.wait_for(call, 30)
    assert not store.exists("run/batches/000001/1-0000.reward")


ORPHAN = """
    import asyncio, sys
    from pathlib import Path
    from steadyhelm.config.reward import CustomTerm
    from steadyhelm.rewards.workers import TermProcesses

    if __name__ == "__main__":
        import multiprocessing, os, signal
        term = CustomTerm(name="obedient", code="terms.py:obedient")
        processes = TermProcesses([term], Path(sys.argv[1]), num_processes=2, sample_deadline_s=60)
        print(*(child.pid for child in multiprocessing.active_children()), flush=True)
        signal.pause()
"""


def test_scoring_processes_end_with_a_killed_parent(base, tmp_path):
    script = tmp_path / "parent.py"
    script.write_text(textwrap.dedent(ORPHAN))
    parent = subprocess.Popen([sys.executable, str(script), str(base)], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    children = [psutil.Process(int(pid)) for pid in parent.stdout.readline().split()]
    time.sleep(1.5)
    assert len(children) == 2
    assert all(child.is_running() for child in children)
    parent.kill()
    parent.wait()
    parent.stdout.close()
    gone, alive = psutil.wait_procs(children, timeout=30)
    assert (len(gone), alive) == (2, [])
