"""The how-to pages' code, taken from the pages and run as their reader would."""

import io
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from steadyhelm.cli import app
from steadyhelm.config.load import load_run_file
from steadyhelm.data.types import FinishReason, Prompt, PromptId, ShardRecord, Trajectory
from steadyhelm.services.prompts import DatasetPrompts
from steadyhelm.services.reward import RewardScorer
from steadyhelm.store import LocalStore
from steadyhelm.store.codec import decode_rewards, encode_rollout
from steadyhelm.store.images import get_image
from typer.testing import CliRunner

from tests.unit.docs.markdown import DOCS, commands, files

DATASET, REWARD = DOCS / "howto" / "own-dataset.md", DOCS / "howto" / "own-reward.md"
USER_LINES = 30


@pytest.mark.parametrize(("page", "file"), [(DATASET, "task.py"), (REWARD, "rewards.py")])
def test_a_how_to_needs_at_most_thirty_lines_of_code(page: Path, file: str):
    code = files(page)[file].splitlines()
    assert 5 < len([line for line in code if line.strip()]) <= USER_LINES
    assert max(map(len, code)) <= 120


def write(page: Path, folder: Path) -> Path:
    for file, text in files(page).items():
        (folder / file).write_text(text)
    return folder


def supplied(page: Path) -> set[str]:
    """The files that the page has its reader supply."""
    (sentence,) = re.findall(r"The images, .*?yours to supply", page.read_text(), re.DOTALL)
    return set(re.findall(r"`(.*?)`", sentence))


@pytest.fixture
def dataset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = write(DATASET, tmp_path)
    for name in ("red", "blue"):
        Image.new("RGB", (56, 56), name).save(folder / f"{name}.png")
    (folder / "eval.jsonl").write_text((folder / "train.jsonl").read_text())
    assert {file.name for file in folder.iterdir()} == set(files(DATASET)) | supplied(DATASET)
    monkeypatch.chdir(folder)
    return folder


async def test_an_own_data_set_arrives_as_prompts(dataset: Path):
    store = LocalStore(dataset / "store")
    source = DatasetPrompts(load_run_file(dataset / "run.yaml"), base=dataset, store=store)
    prompts = {prompt.pair_id: prompt for prompt in (await source.prompts(1)).value}
    assert set(prompts) == {"train.jsonl:0", "train.jsonl:1"}
    red = prompts["train.jsonl:0"]
    assert "What is in the picture?" in red.text
    first, second = red.text.index("A red square."), red.text.index("A blue circle.")
    assert (red.label == 1) == (first < second)
    assert Image.open(io.BytesIO(get_image(store, red.images[0]))).convert("RGB").getpixel((0, 0)) == (255, 0, 0)
    held_out = (await source.held_out(0)).value
    assert [(prompt.label, prompt.swapped) for prompt in held_out] == [(1, False), (2, True)] * 2


def test_the_commands_to_look_at_a_data_set_work(dataset: Path):
    looks = [
        line.split()[1:] for line in commands(DATASET) if line.startswith(("steadyhelm validate", "steadyhelm data"))
    ]
    assert [words[0] for words in looks] == ["validate", "data"]
    answers = [CliRunner().invoke(app, words) for words in looks]
    assert [answer.exit_code for answer in answers] == [0, 0]
    assert "run.yaml is valid: my-judge, stable_reinforce, 100 iterations of 2 rollouts" in answers[0].output
    assert answers[1].output.count("better: 1 · images: ") == 2
    assert "It is blue." in answers[1].output


def trajectory(number: int, group: str, answer: str, num_tokens: int) -> Trajectory:
    text = f"<think>So Response {answer} is better.</think><answer>{answer}</answer>"
    return Trajectory(
        prompt=Prompt(
            prompt_id=PromptId(f"{group}s{number}"),
            group_id=group,
            text="Which is better?",
            images=(),
            label=1,
            swapped=False,
            seed=number,
        ),
        prompt_tokens=np.arange(4, dtype=np.int32),
        tokens=np.arange(num_tokens, dtype=np.int32),
        logprobs=np.zeros(num_tokens, np.float32),
        versions=np.zeros(num_tokens, np.int32),
        attempt=1,
        finish=FinishReason.STOP,
        completion_text=text if answer in "12" else answer,
    )


async def test_an_own_reward_scores_a_shard(tmp_path: Path):
    base = write(DATASET, tmp_path)
    write(REWARD, tmp_path)
    config = load_run_file(base / "run.yaml").reward
    assert config.combine == "r1_reward"
    rows = [trajectory(0, "0:7", "1", 100), trajectory(1, "0:7", "2", 300), trajectory(2, "0:7", "1", 500)]
    rows += [trajectory(0, "0:8", "2", 200), trajectory(1, "0:8", "2", 200), trajectory(2, "0:8", "no answer", 200)]
    store = LocalStore(tmp_path / "store")
    ref = store.put("run/batches/000001/1-0000.rollout", encode_rollout(rows))
    ids = tuple(row.prompt.prompt_id for row in rows)
    shard = ShardRecord(shard=0, rollout=ref, prompt_ids=ids, num_tokens=1500, min_version=0, max_version=0, attempt=1)
    scorer = RewardScorer(config, base=base, store=store, group_size=3)
    try:
        scored, valid = (await scorer.score(shard)).value
    finally:
        scorer.close()
    rewards = decode_rewards(store.read(scored))
    assert valid == (True,) * 6
    assert rewards.components["brevity"].tolist() == [1.0, 0.5, 0.0, 1.0, 1.0, 1.0]
    assert rewards.components["majority"].tolist() == [1.0, 0.0, 1.0, 1.0, 1.0, 0.0]
    # format 0.5 + choice·(1 + 0.5·consistency) + 0.2·brevity + 0.1·majority
    assert rewards.total.tolist() == pytest.approx([2.3, 0.6, 2.1, 0.8, 0.8, 0.2])
