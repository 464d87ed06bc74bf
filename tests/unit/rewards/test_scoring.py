import textwrap
from pathlib import Path

import numpy as np
import pytest
from steadyhelm.config.reward import ChoiceTerm, ConsistencyTerm, CustomTerm, FormatTerm, Reward
from steadyhelm.data.types import FinishReason, PromptId
from steadyhelm.errors import ConfigError
from steadyhelm.rewards import Sample, Score
from steadyhelm.rewards.consistency import RulesJudge
from steadyhelm.rewards.custom import load_term, score_unit
from steadyhelm.rewards.interface import units
from steadyhelm.rewards.scoring import means, score_samples


def sample(number: int, text: str, *, group: str = "", finish: FinishReason = FinishReason.STOP, **meta: str) -> Sample:
    return Sample(
        prompt_id=PromptId(f"0:{number}"),
        group_id=group or f"0:{number}",
        pair_id=f"p{number}",
        prompt_text="Which?",
        label=1,
        swapped=False,
        completion_text=text,
        finish=finish,
        num_tokens=len(text),
        meta=meta,
    )


def said(conclusion: int, answer: int) -> str:
    return f"<think>So Response {conclusion} is better.</think><answer>{answer}</answer>"


class HereRunner:
    """Runs custom terms in this process."""

    def __init__(self, base: Path, *terms: CustomTerm) -> None:
        self.base = base
        self.terms = {term.name: load_term(base, term) for term in terms}

    async def run(self, name, unit):
        return score_unit(self.terms[name], unit, self.base)


def write(folder: Path, text: str) -> Path:
    (folder / "terms.py").write_text(textwrap.dedent(text))
    return folder


async def test_the_default_reward_of_a_few_completions():
    texts = [said(1, 1), said(2, 1), said(1, 2), "1", "<answer>1</answer>"]
    rewards = await score_samples(
        [sample(i, text) for i, text in enumerate(texts)], Reward(), judge=RulesJudge(), scopes={}
    )
    assert rewards.total.tolist() == [2.0, 1.0, 0.5, 0.0, 1.0]
    assert rewards.valid.tolist() == [True] * 5
    assert rewards.components["format"].tolist() == [1, 1, 1, 0, 0]
    assert rewards.components["choice"].tolist() == [1, 1, 0, 0, 1]
    assert rewards.components["consistency"].tolist() == [1, -1, -1, 0, 0]
    assert [detail.get("choice") for detail in rewards.detail] == [1, 1, 2, None, 1]
    assert rewards.total.dtype == np.float32


async def test_in_the_releases_modes_an_untagged_answer_earns_all_but_the_format():
    released = (FormatTerm(), ChoiceTerm(mode="release"), ConsistencyTerm(mode="release", lines=3))
    texts = ["I look.\nSo Response 1 is better.", "I look.\nSo Response 2 is better.", "1", said(1, 1)]
    samples = [sample(i, text) for i, text in enumerate(texts)]
    rewards = await score_samples(samples, Reward(terms=released), judge=RulesJudge(), scopes={})
    assert rewards.total.tolist() == [1.5, 0.0, 1.0, 2.0]
    strict = await score_samples(samples, Reward(), judge=RulesJudge(), scopes={})
    assert strict.total.tolist() == [0.0, 0.0, 0.0, 2.0]


async def test_means_are_over_valid_samples_only():
    samples = [sample(0, said(1, 1)), sample(1, said(2, 2)), sample(2, said(1, 1), finish=FinishReason.ABORT)]
    rewards = await score_samples(samples, Reward(), judge=RulesJudge(), scopes={})
    assert rewards.valid.tolist() == [True, True, False]
    assert np.isnan(rewards.total[2])
    assert rewards.detail[2]["error"] == "the engine aborted this completion"
    assert means(rewards) == {"mean": 1.25, "format": 1.0, "choice": 0.5, "consistency": 1.0}


async def test_a_shard_without_a_valid_sample_has_no_means():
    samples = [sample(0, "", finish=FinishReason.ABORT)]
    rewards = await score_samples(samples, Reward(terms=(FormatTerm(),)), judge=RulesJudge(), scopes={})
    assert np.isnan(list(means(rewards).values())).tolist() == [True, True]


async def test_a_truncated_completion_is_scored_by_its_text():
    samples = [sample(0, "<think>So Response 1", finish=FinishReason.LENGTH)]
    rewards = await score_samples(samples, Reward(), judge=RulesJudge(), scopes={})
    assert (rewards.total.tolist(), rewards.valid.tolist()) == ([0.0], [True])


class DownJudge:
    """A judge model that cannot be reached."""

    async def judge(self, cases):
        raise ConnectionError("refused")


async def test_a_judge_that_is_down_leaves_samples_unscored_also_wrong_ones():
    samples = [sample(0, said(1, 1)), sample(1, said(2, 2)), sample(2, "no answer")]
    rewards = await score_samples(samples, Reward(), judge=DownJudge(), scopes={})
    assert rewards.valid.tolist() == [False, False, True]
    assert "consistency: the judge failed: ConnectionError('refused')" in rewards.detail[0]["error"]


async def test_a_total_beyond_float32_is_unscored():
    config = Reward(terms=(FormatTerm(weight=1e300), ChoiceTerm()))
    rewards = await score_samples([sample(0, said(1, 1))], config, judge=RulesJudge(), scopes={})
    assert rewards.valid.tolist() == [False]
    assert rewards.detail[0]["error"] == "the weighted sum is not a finite float32"


def test_units_of_every_scope():
    samples = [
        sample(0, "", group="a"),
        sample(1, "", group="b", link_id="L"),
        sample(2, "", group="a"),
        sample(3, "", group="c", link_id="L"),
    ]
    assert units(samples, "sample") == [(0,), (1,), (2,), (3,)]
    assert units(samples, "group") == [(0, 2), (1,), (3,)]
    assert units(samples, "linked") == [(0, 2), (1, 3)]
    assert units(samples, "batch") == [(0, 1, 2, 3)]
    assert units([], "batch") == []


GROUP_TERM = """
    class Shortest:
        scope = "group"

        def score(self, samples):
            best = min(sample.num_tokens for sample in samples)
            return [1.0 if sample.num_tokens == best else 0.0 for sample in samples]
"""


async def test_a_group_term_sees_whole_groups_and_leaves_incomplete_ones_unscored(tmp_path):
    write(tmp_path, GROUP_TERM)
    term = CustomTerm(name="shortest", code="terms.py:Shortest")
    samples = [
        sample(0, "aa", group="a"),
        sample(1, "b", group="b"),
        sample(2, "a", group="a"),
        sample(3, "bb", group="b"),
        sample(4, "c", group="c"),
    ]
    rewards = await score_samples(
        samples,
        Reward(terms=(term,)),
        judge=RulesJudge(),
        scopes={"shortest": "group"},
        runner=HereRunner(tmp_path, term),
        group_size=2,
    )
    assert rewards.valid.tolist() == [True, True, True, True, False]
    assert rewards.total[:4].tolist() == [0.0, 1.0, 1.0, 0.0]
    assert rewards.detail[4]["error"] == "shortest: its prompt's group is incomplete in this shard"


async def test_custom_terms_are_added_to_the_papers_reward(tmp_path):
    write(tmp_path, "def brief(sample): return -float(sample.num_tokens)")
    term = CustomTerm(name="brief", code="terms.py:brief", weight=0.5)
    config = Reward(terms=(FormatTerm(), ChoiceTerm(), ConsistencyTerm(), term))
    rewards = await score_samples(
        [sample(0, said(1, 1))],
        config,
        judge=RulesJudge(),
        scopes={"brief": "sample"},
        runner=HereRunner(tmp_path, term),
    )
    assert rewards.total.tolist() == [2.0 - 0.5 * len(said(1, 1))]


@pytest.mark.parametrize(
    ("value", "error"),
    [
        (None, "it returned None: no score"),
        (float("nan"), "it returned nan; a finite number is needed"),
        (float("inf"), "it returned inf; a finite number is needed"),
        (np.float32("nan"), "it returned nan; a finite number is needed"),
        ("1.0", "it returned '1.0' (str); a number is needed"),
        ([1.0], "it returned [1.0] (list); a number is needed"),
        (1 + 0j, "it returned (1+0j) (complex); a number is needed"),
    ],
)
def test_a_value_that_is_no_finite_number_is_no_score(value, error):
    assert Score.checked(value) == Score(value=None, error=error)


@pytest.mark.parametrize("value", [1, 1.0, True, np.float32(1), np.int64(1)])
def test_any_finite_number_is_a_score(value):
    assert Score.checked(value) == Score(value=1.0)


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("term = 3", r"terms\.py:term: 3 is no reward term"),
        ("async def term(sample): return 1.0", "it is async; a reward term is a plain function"),
        ("class term:\n    scope = 'world'\n    def score(self, samples): ...", "its scope is 'world'; declare one of"),
        ("class term:\n    def score(self, samples): ...", "its scope is None; declare one of sample, group"),
        (
            "class term:\n    scope = 'group'\n    def __init__(self, x): ...\n    def score(self, s): ...",
            "without arguments failed",
        ),
    ],
)
def test_what_is_no_reward_term_is_refused(tmp_path, code, message):
    write(tmp_path, code)
    with pytest.raises(ConfigError, match=message):
        load_term(tmp_path, CustomTerm(name="t", code="terms.py:term"))


def test_an_error_and_a_wrong_number_of_values_touch_their_unit_only(tmp_path):
    write(
        tmp_path,
        """
        def raises(sample):
            return {}["absent"]

        class Short:
            scope = "batch"
            def score(self, samples): return [1.0]
        """,
    )
    pair = [sample(0, ""), sample(1, "")]
    raised = score_unit(load_term(tmp_path, CustomTerm(name="a", code="terms.py:raises")), pair[:1], tmp_path)
    assert raised == [Score(value=None, error="it failed at terms.py line 3: KeyError: 'absent'")]
    short = score_unit(load_term(tmp_path, CustomTerm(name="b", code="terms.py:Short")), pair, tmp_path)
    assert [score.value for score in short] == [None, None]
    assert "score returned 1 values for 2 samples" in short[0].error
