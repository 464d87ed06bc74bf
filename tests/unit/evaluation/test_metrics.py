import itertools
import json
import math

import numpy as np
import pytest
from steadyhelm.data.types import FinishReason, Prompt, PromptId, Trajectory
from steadyhelm.evaluation import evaluate, majority
from steadyhelm.evaluation.intervals import clustered, wilson
from steadyhelm.telemetry import metrics as names


def prompt(pair: int, swapped: bool, label: int, sample: int | None = None) -> Prompt:
    suffix = "" if sample is None else f"s{sample}"
    return Prompt(
        prompt_id=PromptId(f"eval:{pair}{'x' if swapped else ''}{suffix}"),
        group_id=f"eval:{pair}",
        text="Which is better?",
        images=(),
        label=3 - label if swapped else label,
        swapped=swapped,
        seed=0,
        pair_id=f"pair-{pair}",
        meta={"form": "which"},
    )


def answer(to: Prompt, text: str, finish: FinishReason = FinishReason.STOP, num_tokens: int = 4) -> Trajectory:
    return Trajectory(
        prompt=to,
        prompt_tokens=np.zeros(3, np.int32),
        tokens=np.zeros(num_tokens, np.int32),
        logprobs=np.zeros(num_tokens, np.float32),
        versions=np.zeros(num_tokens, np.int32),
        attempt=1,
        finish=finish,
        completion_text=text,
    )


def said(choice: int) -> str:
    return f"<think>So Response {choice} is better.</think><answer>{choice}</answer>"


def both_orders(labels: list[int]) -> list[Prompt]:
    return [prompt(i, swapped, label) for i, label in enumerate(labels) for swapped in (False, True)]


def test_a_judge_that_always_says_one_is_right_in_one_order_only():
    prompts = both_orders([1, 1, 1, 1])
    result = evaluate(prompts, [answer(p, said(1)) for p in prompts])
    assert result.accuracy_unswapped == 1.0
    assert result.accuracy == 0.5
    assert result.both_orders == 0.0
    assert result.accuracy_swapped == 0.0
    assert result.first_slot == 1.0
    assert result.always_first == 0.5


def test_a_right_judge_is_right_in_both_orders():
    prompts = both_orders([1, 2, 2, 1])
    result = evaluate(prompts, [answer(p, said(p.label)) for p in reversed(prompts)])
    assert (result.accuracy, result.both_orders, result.first_slot) == (1.0, 1.0, 0.5)
    assert (result.format, result.consistency, result.unparsable) == (1.0, 1.0, 0.0)
    assert result.num_pairs == 4
    assert result.accuracy_interval == pytest.approx((0.5101092, 1.0))  # Wilson of 4 out of 4: pairs, not answers


def test_unparsable_answers_are_wrong_and_no_choice():
    prompts = both_orders([1, 2])
    texts = ["1", "<answer>one</answer>", said(1), said(2)]
    result = evaluate(prompts, [answer(p, text) for p, text in zip(prompts, texts, strict=True)])
    assert [item.correct for item in result.items] == [False, False, False, False]
    assert [item.choice for item in result.items] == [None, None, 1, 2]
    assert (result.accuracy, result.unparsable, result.first_slot) == (0.0, 0.5, 0.5)


def test_format_consistency_truncation_and_length_are_shares_of_completions():
    prompts = both_orders([1, 1])
    texts = [
        said(1),
        "<think>So Response 1 is better.</think><answer>2</answer>",
        "<think>Hm.</think> <answer>1</answer>",
        "<think>So Response 2 is",
    ]
    finishes = [FinishReason.STOP, FinishReason.STOP, FinishReason.STOP, FinishReason.LENGTH]
    result = evaluate(
        prompts,
        [answer(*row) for row in zip(prompts, texts, finishes, (2, 4, 6, 8), strict=True)],
    )
    assert (result.format, result.consistency, result.truncated, result.length_mean) == (0.5, 0.25, 0.25, 5.0)
    assert [item.correct for item in result.items] == [True, True, True, False]
    assert (result.accuracy, result.both_orders) == (0.75, 0.5)


def test_nobody_choosing_leaves_the_bias_open():
    prompts = both_orders([1])
    result = evaluate(prompts, [answer(p, "") for p in prompts])
    assert result.first_slot is None
    assert names.EVAL_FIRST_SLOT not in result.metrics
    assert result.metrics[names.EVAL_UNPARSABLE] == 1.0


def test_the_result_is_json_and_speaks_the_metric_names():
    prompts = both_orders([1, 2, 2])
    result = evaluate(prompts, [answer(p, said(1)) for p in prompts])
    again = json.loads(json.dumps(result.to_json()))
    assert again["accuracy"] == 0.5
    assert again["items"][1] == {
        "pair_id": "pair-0",
        "swapped": True,
        "label": 2,
        "votes": [1],
        "choice": 1,
        "correct": False,
        "meta": {"form": "which"},
    }
    assert "a tie or no vote is wrong" in again["rule"]
    assert result.metrics[names.EVAL_ACCURACY] == 0.5
    assert result.metrics[names.EVAL_PAIRS] == 3.0
    assert set(result.metrics) <= set(names.METRICS)


def test_the_data_sets_own_order_alone_says_nothing_about_the_other():
    prompts = [p for p in both_orders([1, 1, 1, 2]) if not p.swapped]
    good = [answer(p, said(1)) for p in prompts]
    result = evaluate(prompts, good, orders=1)
    assert (result.accuracy, result.accuracy_unswapped, result.always_first, result.num_pairs) == (0.75, 0.75, 0.75, 4)
    assert (result.accuracy_swapped, result.both_orders, result.both_orders_interval) == (None, None, None)
    assert result.accuracy_interval == pytest.approx(wilson(0.75, 4))
    assert not any(name.startswith("eval/both") for name in result.metrics)
    swapped = both_orders([1])
    with pytest.raises(ValueError, match="pair 'pair-0' was asked in the swapped order"):
        evaluate(swapped, [answer(p, said(1)) for p in swapped], orders=1)


def test_samples_of_one_prompt_vote():
    prompts = [prompt(0, swapped, 1, sample) for swapped in (False, True) for sample in range(3)]
    texts = [said(1), said(1), said(2), said(1), "unreadable", said(2)]
    result = evaluate(prompts, [answer(p, text) for p, text in zip(prompts, texts, strict=True)])
    assert result.votes_per_prompt == 3
    assert [(item.votes, item.choice) for item in result.items] == [((1, 1, 2), 1), ((1, None, 2), None)]
    assert [item.correct for item in result.items] == [True, False]


def test_wrong_input_is_refused():
    prompts = both_orders([1, 2])
    good = [answer(p, said(1)) for p in prompts]
    with pytest.raises(ValueError, match="there are no prompts"):
        evaluate([], [])
    with pytest.raises(ValueError, match="1 prompts have no trajectory, 'eval:1x' among them"):
        evaluate(prompts, good[:-1])
    with pytest.raises(ValueError, match="'eval:0' has two trajectories"):
        evaluate(prompts, [*good, good[0]])
    with pytest.raises(ValueError, match="belong to no prompt"):
        evaluate(prompts[:2], good)
    with pytest.raises(ValueError, match="pair 'pair-0' was asked in one order only"):
        evaluate(prompts[:1], good[:1])
    even = [prompt(0, swapped, 1, sample) for swapped in (False, True) for sample in range(2)]
    with pytest.raises(ValueError, match=r"samples per prompt are \[2\]; voting needs the same odd number"):
        evaluate(even, [answer(p, said(1)) for p in even])


@pytest.mark.parametrize(("num_votes", "expected"), [(1, 0.7200), (3, 0.8087), (5, 0.8624), (15, 0.9662)])
def test_majority_over_independent_votes_of_72_percent(num_votes, expected):
    right = math.fsum(
        0.72 ** votes.count(1) * 0.28 ** votes.count(2)
        for votes in itertools.product((1, 2), repeat=num_votes)
        if majority(votes) == 1
    )
    assert right == pytest.approx(expected, abs=5e-5)


def test_unparsable_votes_do_not_count_and_ties_have_no_winner():
    assert majority((1, None, None)) == 1
    assert majority((1, 2, None)) is None
    assert majority((None, None, None)) is None
    assert majority((2, 2, 1, None, 2)) == 2


def test_wilson_intervals_have_their_textbook_values():
    assert wilson(0.5, 100) == pytest.approx((0.4038315, 0.5961685))
    assert wilson(0.0, 10) == pytest.approx((0.0, 0.2775328))
    assert wilson(1.0, 10) == pytest.approx((0.7224672, 1.0))
    with pytest.raises(ValueError, match="there must be trials"):
        wilson(0.5, 0)


def test_dependent_orders_widen_the_interval():
    independent = [1.0] * 25 + [0.5] * 50 + [0.0] * 25
    dependent = [1.0] * 50 + [0.0] * 50
    always_first = [0.5] * 100
    assert clustered(dependent, 2) == pytest.approx(wilson(0.5, 100))
    assert clustered(independent, 2) == pytest.approx(wilson(0.5, 200))
    assert clustered(always_first, 2) == pytest.approx(wilson(0.5, 200))
    assert clustered([1.0] * 40, 2) == pytest.approx(wilson(1.0, 40))
    with pytest.raises(ValueError, match="no clusters"):
        clustered([], 2)


def test_the_interval_covers_the_truth_in_about_95_of_100_draws():
    rng = np.random.default_rng(0)
    hits = 0
    for _ in range(1000):
        hard = rng.random(200) < 0.5
        chance = np.where(hard, 0.65, 0.95)
        scores = (rng.random((2, 200)) < chance).mean(axis=0)
        low, high = clustered(scores.tolist(), 2)
        hits += low <= 0.8 <= high
    assert 930 <= hits <= 985
