import hashlib
import io
import textwrap
from pathlib import Path

import pytest
from PIL import Image
from steadyhelm.config import RunFile
from steadyhelm.errors import ConfigError, DataError
from steadyhelm.services.prompts import DatasetPrompts
from steadyhelm.store import LocalStore
from steadyhelm.store.images import get_image

TASK = """
    from pathlib import Path
    from steadyhelm.data.types import PreferencePair

    HERE = Path(__file__).parent

    def pairs():
        image = (HERE / "a.png").read_bytes()
        return [
            PreferencePair(
                pair_id=f"train-{i}", question=f"Q{i}?", responses=(f"a{i}", f"b{i}"), label=1 + i % 2,
                images=(image,), trace=f"trace {i}", meta={"i": str(i)},
            )
            for i in range(5)
        ]

    def untraced():
        return [PreferencePair(pair_id="p", question="Q?", responses=("a", "b"), label=1)]

    def torn():
        good = PreferencePair(pair_id="fine", question="Q?", responses=("a", "b"), label=1)
        data = (HERE / "a.png").read_bytes()[:-30]
        return [good, PreferencePair(pair_id="bad", question="Q?", responses=("a", "b"), label=1, images=(data,))]

    def template(question, first, second):
        return f"{question} {first} | {second}"

    def silent(question, first, second):
        return None
"""


def png(colour: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (28, 28), (colour, 40, 200)).save(buffer, format="PNG")
    return buffer.getvalue()


@pytest.fixture
def base(tmp_path: Path) -> Path:
    folder = tmp_path / "task"
    folder.mkdir()
    (folder / "task.py").write_text(textwrap.dedent(TASK))
    (folder / "a.png").write_bytes(png(10))
    return folder


@pytest.fixture
def store(tmp_path: Path) -> LocalStore:
    return LocalStore(tmp_path / "store")


def run_file(
    train: str = "pairs", *, sft: bool = False, samples: int = 1, per_iteration: int = 3, seed: int = 0, **data: object
) -> RunFile:
    return RunFile.model_validate(
        {
            "name": "r",
            "seed": seed,
            "model": {"path": "m"},
            "data": {"train": f"task.py:{train}", "template": "task.py:template", **data},
            "algorithm": {"type": "sft"} if sft else {"type": "stable_reinforce"},
            "rollout": {"samples_per_prompt": samples},
            "learner": {"train_batch": 1},
            "schedule": {"iterations": 3, "prompts_per_iteration": per_iteration},
        }
    )


async def test_prompts_follow_the_cursor_with_images_by_key(base, store):
    source = DatasetPrompts(run_file(swap="none", shuffle=False), base=base, store=store)
    first, second, third = (await source.prompts(2)).value
    assert [p.prompt_id for p in (first, second, third)] == ["0:3", "0:4", "1:0"]
    assert first.text == "Q3? a3 | b3"
    assert (first.label, first.swapped, first.pair_id, first.group_id) == (2, False, "train-3", "0:3")
    assert (first.trace, dict(first.meta)) == (None, {"i": "3"})
    assert first.images == (f"images/{hashlib.sha256(png(10)).hexdigest()}",)
    assert get_image(store, first.images[0]) == png(10)
    assert list(store.list("images/")) == [first.images[0]]


async def test_every_process_gets_the_same_prompts_at_every_call(base, store):
    one = DatasetPrompts(run_file(seed=5), base=base, store=store)
    two = DatasetPrompts(run_file(seed=5), base=base, store=store)
    for iteration in (1, 2, 7):
        assert (await one.prompts(iteration)).value == (await two.prompts(iteration)).value
    other = DatasetPrompts(run_file(seed=6), base=base, store=store)
    assert (await one.prompts(1)).value != (await other.prompts(1)).value


async def test_a_swapped_prompt_has_its_responses_and_label_changed_together(base, store):
    source = DatasetPrompts(run_file(per_iteration=200), base=base, store=store)
    prompts = (await source.prompts(1)).value
    swaps = 0
    for prompt in prompts:
        index = int(prompt.pair_id.removeprefix("train-"))
        texts = {False: f"Q{index}? a{index} | b{index}", True: f"Q{index}? b{index} | a{index}"}
        assert prompt.text == texts[prompt.swapped]
        assert prompt.label == (2 - index % 2 if prompt.swapped else 1 + index % 2)
        swaps += prompt.swapped
    assert 70 < swaps < 130
    assert len({prompt.seed for prompt in prompts}) == 200


async def test_samples_of_a_prompt_stand_together_and_share_everything_but_the_seed(base, store):
    source = DatasetPrompts(run_file(samples=3, shuffle=False), base=base, store=store)
    prompts = (await source.prompts(1)).value
    assert [p.prompt_id for p in prompts[:4]] == ["0:0s0", "0:0s1", "0:0s2", "0:1s0"]
    assert [p.group_id for p in prompts[:4]] == ["0:0", "0:0", "0:0", "0:1"]
    assert len(prompts) == 9
    assert len({p.seed for p in prompts}) == 9
    assert len({(p.text, p.label, p.swapped) for p in prompts[:3]}) == 1


async def test_a_replacement_is_the_same_prompt_with_another_seed(base, store):
    source = DatasetPrompts(run_file(), base=base, store=store)
    original = (await source.prompts(1)).value[0]
    once = (await source.replacement(original.prompt_id)).value
    twice = (await source.replacement(once.prompt_id)).value
    assert (once.prompt_id, twice.prompt_id) == (f"{original.prompt_id}r1", f"{original.prompt_id}r2")
    assert len({original.seed, once.seed, twice.seed}) == 3
    for other in (once, twice):
        assert (other.text, other.label, other.swapped) == (original.text, original.label, original.swapped)
        assert other.group_id == original.group_id
    with pytest.raises(ValueError, match="not a training prompt's id"):
        await source.replacement("eval:0")


async def test_held_out_pairs_come_in_both_orders_side_by_side(base, store):
    source = DatasetPrompts(run_file(eval="task.py:pairs"), base=base, store=store)
    prompts = (await source.held_out(2)).value
    assert [p.prompt_id for p in prompts] == ["eval:0", "eval:0x", "eval:1", "eval:1x"]
    assert [p.text for p in prompts[:2]] == ["Q0? a0 | b0", "Q0? b0 | a0"]
    assert [p.label for p in prompts] == [1, 2, 2, 1]
    assert [p.swapped for p in prompts] == [False, True, False, True]
    assert [p.pair_id for p in prompts] == ["train-0", "train-0", "train-1", "train-1"]
    assert len({p.seed for p in prompts}) == 4
    assert len((await source.held_out(0)).value) == 10
    assert len((await source.held_out(99)).value) == 10
    assert all(p.trace is None for p in prompts)


async def test_in_fixed_order_held_out_pairs_come_as_the_data_set_has_them(base, store):
    both = DatasetPrompts(run_file(eval="task.py:pairs"), base=base, store=store)
    fixed = DatasetPrompts(run_file(eval="task.py:pairs", eval_order="fixed"), base=base, store=store)
    prompts = (await fixed.held_out(2)).value
    assert [p.prompt_id for p in prompts] == ["eval:0", "eval:1"]
    assert prompts == (await both.held_out(2)).value[::2]


async def test_without_evaluation_data_there_is_nothing_held_out(base, store):
    source = DatasetPrompts(run_file(), base=base, store=store)
    with pytest.raises(ConfigError, match=r"data\.eval is not set"):
        await source.held_out(0)


async def test_fine_tuning_gets_traces_one_sample_and_no_swap(base, store):
    source = DatasetPrompts(run_file(sft=True, samples=4, swap="none", shuffle=False), base=base, store=store)
    prompts = (await source.prompts(1)).value
    assert [(p.prompt_id, p.trace, p.swapped) for p in prompts] == [
        ("0:0", "trace 0", False),
        ("0:1", "trace 1", False),
        ("0:2", "trace 2", False),
    ]
    with pytest.raises(DataError, match=r"task\.py:untraced: record 0 \(pair_id 'p'\): trace is None"):
        DatasetPrompts(run_file("untraced", sft=True, swap="none"), base=base, store=store)


async def test_without_a_template_the_built_in_prompt_is_used(base, store):
    source = DatasetPrompts(run_file("untraced", template=None, swap="none", per_iteration=1), base=base, store=store)
    prompt = (await source.prompts(1)).value[0]
    assert "[Response 1]\na\n\n[Response 2]\nb" in prompt.text


def test_a_torn_image_is_named_with_its_record(base, store):
    with pytest.raises(
        DataError, match=r"^task\.py:torn: record 1 \(pair_id 'bad'\): image 0 \(\d+ bytes\) cannot be decoded"
    ):
        DatasetPrompts(run_file("torn"), base=base, store=store)
    assert list(store.list("images/")) == []


def test_a_template_that_returns_nothing_is_refused(base, store):
    with pytest.raises(
        ConfigError, match=r"task\.py:silent: it returned None \(NoneType\); it must return a non-empty"
    ):
        DatasetPrompts(run_file(template="task.py:silent"), base=base, store=store)


def test_a_data_set_that_is_no_sequence_is_refused(base, store):
    with pytest.raises(ConfigError, match=r"the call failed: TypeError: template\(\) missing 3"):
        DatasetPrompts(run_file("template"), base=base, store=store)
    (base / "other.py").write_text("def nothing(): return None\ndef empty(): return []\n")
    config = run_file()
    broken = config.model_copy(update={"data": config.data.model_copy(update={"train": "other.py:nothing"})})
    with pytest.raises(
        ConfigError, match=r"other\.py:nothing: it returned None \(NoneType\); it must return a sequence"
    ):
        DatasetPrompts(broken, base=base, store=store)
    empty = config.model_copy(update={"data": config.data.model_copy(update={"train": "other.py:empty"})})
    with pytest.raises(DataError, match=r"other\.py:empty: the data set is empty"):
        DatasetPrompts(empty, base=base, store=store)
