import asyncio
import io
from collections import Counter

import numpy as np
from PIL import Image
from steadyhelm.config.reward import Reward
from steadyhelm.data.types import FinishReason, PromptId
from steadyhelm.rewards import Sample
from steadyhelm.rewards.consistency import RulesJudge
from steadyhelm.rewards.scoring import score_samples


def test_no_image_is_in_both_splits_and_every_image_is_in_one(digits):
    train, held_out = digits.split()
    trained = {index for indices in train.values() for index in indices}
    evaluated = {index for indices in held_out.values() for index in indices}

    assert trained & evaluated == set()
    assert trained | evaluated == set(range(1797))
    assert len(evaluated) == 359
    assert {digit: len(indices) for digit, indices in held_out.items()} == {
        0: 36, 1: 36, 2: 35, 3: 37, 4: 36, 5: 36, 6: 36, 7: 36, 8: 35, 9: 36
    }  # fmt: skip


def test_no_picture_of_the_evaluation_is_seen_in_training_byte_for_byte(digits):
    seen = {pair.images[0] for pair in (*digits.train_pairs(), *digits.sft_pairs())}
    assert seen.isdisjoint(pair.images[0] for pair in digits.eval_pairs())


def test_every_text_has_label_1_as_often_as_label_2(digits, pairs):
    labels = Counter((pair.question, pair.responses, pair.label) for pair in pairs)

    assert len(labels) == 2 * 98  # 90 ordered pairs of digits; 2 bounds, odd and even in both orders
    for question, responses, _ in labels:
        assert labels[question, responses, 1] == labels[question, responses, 2]


def test_both_orders_of_two_responses_occur_equally_often(pairs):
    orders = Counter((pair.question, pair.responses) for pair in pairs)
    assert all(orders[question, responses[::-1]] == count for (question, responses), count in orders.items())


def test_the_label_names_the_response_that_is_true_of_the_image(digits, pairs):
    scanned = {digits._images()[0][index]: int(digit) for index, digit in enumerate(digits._images()[1])}
    for pair in pairs:
        digit, right = scanned[pair.images[0]], pair.responses[pair.label - 1]
        if pair.meta["form"] == "which":
            truth = f"It is {digit}."
        elif pair.meta["form"] == "parity":
            truth = "It is true." if (digit % 2 == 1) == ("odd" in pair.question) else "It is false."
        else:
            bound = int(pair.question.split(",")[0].split()[-1])
            truth = "It is true." if digit > bound else "It is false."
        assert right == truth
        assert pair.meta["digit"] == str(digit)


def test_at_least_2000_held_out_pairs_and_all_three_forms_in_any_250_of_them(digits):
    pairs = digits.eval_pairs()
    assert Counter(pair.meta["form"] for pair in pairs) == {"which": 540, "size": 1360, "parity": 328}
    assert min(Counter(pair.meta["form"] for pair in pairs[:250]).values()) >= 30


def test_the_pairs_are_the_same_at_every_call_and_their_ids_are_unique(digits, pairs):
    again = getattr(digits, f"{pairs[0].pair_id.split('-')[0]}_pairs")()
    assert [(pair.pair_id, pair.label, pair.images) for pair in again] == [
        (pair.pair_id, pair.label, pair.images) for pair in pairs
    ]
    assert len({pair.pair_id for pair in pairs}) == len(pairs)


def test_an_image_is_the_8_by_8_scan_enlarged_seven_times(digits):
    from sklearn.datasets import load_digits

    picture = Image.open(io.BytesIO(digits._images()[0][3]))
    assert (picture.format, picture.mode, picture.size) == ("PNG", "RGB", (56, 56))
    levels = np.asarray(picture)[::7, ::7, 0].astype(float) * 16 / 255
    np.testing.assert_allclose(levels, load_digits().images[3], atol=0.04)


def test_only_the_cold_start_has_traces(digits):
    assert all(pair.trace is None for pair in (*digits.train_pairs(), *digits.eval_pairs()))
    assert all(pair.trace for pair in digits.sft_pairs())


def test_a_trace_says_what_is_seen_and_ends_in_the_label(digits):
    which, size = digits.claims()[0], digits.claims()[90]
    assert (which.responses, size.question) == (("It is 1.", "It is 0."), "Is it larger than 4, true or false?")
    assert digits.trace(which, 2, 0) == (
        "<think>The image shows 0. Response 1 says 1. Response 2 says 0. Response 2 is better.</think>"
        "<answer>2</answer>"
    )
    assert digits.trace(size, 1, 7) == (
        "<think>The image shows 7, true. Response 1 says true. Response 2 says false. Response 1 is better."
        "</think><answer>1</answer>"
    )


def test_every_trace_scores_full_marks(digits):
    samples = [
        Sample(
            prompt_id=PromptId(f"0:{index}"),
            group_id=f"0:{index}",
            pair_id=pair.pair_id,
            prompt_text=digits.template(pair.question, *pair.responses),
            label=pair.label,
            swapped=False,
            completion_text=pair.trace,
            finish=FinishReason.STOP,
            num_tokens=32,
        )
        for index, pair in enumerate(digits.sft_pairs()[:600])
    ]
    rewards = asyncio.run(score_samples(samples, Reward(), judge=RulesJudge(), scopes={}))
    assert rewards.total.tolist() == [2.0] * 600


def test_a_blanked_pair_differs_in_nothing_but_its_picture(digits):
    pair, blank = digits.eval_pairs()[17], digits.blank_eval_pairs()[17]
    assert (blank.question, blank.responses, blank.label) == (pair.question, pair.responses, pair.label)
    assert len(set(blank.images) | set(digits.blank_train_pairs()[5].images)) == 1
    assert np.asarray(Image.open(io.BytesIO(blank.images[0]))).max() == 0


def test_a_message_shows_question_and_responses_in_order(digits):
    assert digits.template("Is it odd, true or false?", "It is true.", "It is false.") == (
        "Is it odd, true or false?\nResponse 1: It is true.\nResponse 2: It is false."
    )
