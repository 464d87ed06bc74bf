import time

import pytest
from steadyhelm.data.types import FinishReason, PromptId
from steadyhelm.rewards.conclusion import conclusion
from steadyhelm.rewards.consistency import JudgeCase, RulesJudge, consistency_rewards, judge_case
from steadyhelm.rewards.interface import Sample


def sample(text: str) -> Sample:
    return Sample(
        prompt_id=PromptId("0:1"),
        group_id="0:1",
        pair_id="p",
        prompt_text="Which?",
        label=1,
        swapped=False,
        completion_text=text,
        finish=FinishReason.STOP,
        num_tokens=3,
    )


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Response 1 is better.", 1),
        ("response 2 is better", 2),
        ("Response 2 is better than Response 1.", 2),
        ("So Response 1 is clearly better.", 1),
        ("Response 1 is by far the best.", 1),
        ("Overall, **Response 2** is better.", 2),
        ("The first one is much better overall", 1),
        ("the second response is preferable", 2),
        ("Answer 2 seems stronger", 2),
        ("Response #2 is better", 2),
        ("Response one is better", 1),
        ("The better response is Response 1.", 1),
        ("The best response is: Response 2", 2),
        ("Therefore the better one is response 2.", 2),
        ("Winner: Response 1", 1),
        ("Response 1 wins.", 1),
        ("Response 2 outperforms Response 1.", 2),
        ("I prefer Response 2.", 2),
        ("I would choose the first response", 1),
        ("So the answer is response 2", 2),
        ("So the correct answer is the first one.", 1),
        ("Final Answer: Response 2", 2),
        ("The final answer is: **Response 1**", 1),
        ("My choice: Response 1.", 1),
        ("Therefore the answer is 1", 1),
        ("Thus, the better answer is 2.</think>", 2),
        ("In conclusion, my final choice is **2**.", 2),
        ("Final answer: 2", 2),
        ("My choice: 2", 2),
        ("I conclude that the answer is one.", 1),
        ("It misreads the scene, so I choose 2.", 2),
        ("So I would pick 1.", 1),
        ("The answer is 2.", 2),
        ("Answer: 1", 1),
    ],
)
def test_a_conclusion_is_read_in_many_wordings(text, expected):
    assert conclusion(text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Response 1 is worse.", 2),
        ("Response 1 is worse than Response 2.", 2),
        ("Response 1 is not better.", 2),
        ("Response 2 isn't better", 1),
        ("Response 1 does not seem better", 2),
        ("Response 1 is not worse", 1),
        ("The worse response is Response 1", 2),
        ("I would not choose Response 1.", 2),
        ("Response 2 loses", 1),
        ("Response 2 is wrong.", 1),
        ("Response 2 is not wrong.", 2),
        ("So the answer is not response 2", 1),
        ("Therefore the answer is not 1.", 2),
        ("So the wrong answer is Response 1.", 2),
        ("The worse answer: Response 2", 1),
        ("I would not choose 1.", 2),
    ],
)
def test_a_verdict_against_one_response_speaks_for_the_other(text, expected):
    assert conclusion(text) == expected


@pytest.mark.parametrize(
    "text",
    [
        "",
        "hello",
        "The image shows 7.",
        "Both are equally good.",
        "two response are the same",
        "Neither Response 1 nor Response 2 is better",
        "Response 1 or Response 2 is better",
        "If Response 1 is better, I say so.",
        "Is Response 1 better? Which response 1 is better?",
        "I do not think that Response 1 is better",
        "Response 1 contradicts the image in line 1",
        "Response 12 is better",
        "Response 1 is better. Response 2 is better.",
        "Response 1 is better in style, but overall Response 2 is better.",
        "Response 1 is right. Response 2 is right.",
        "<answer>1</answer>",
        "So the answer is response 1 or response 2.",
        "If the answer is response 2, I say so.",
        "I doubt whether the correct answer is response 2.",
        "Is the answer response 2?",
        "So the answer is 12.",
        "So the answer is 1.5",
        "So the answer is 2 apples.",
        "So the answer is 2 or 1.",
        "So Response 1 says that the answer is 2.",
        "I choose 2 criteria to compare them.",
        "They choose 2.",
        "The final answer is 7.",
        "My choice: both",
    ],
)
def test_a_thought_without_a_clear_conclusion_has_none(text):
    assert conclusion(text) is None


def test_the_last_line_with_a_verdict_decides():
    assert conclusion("Response 1 is better.\nResponse 2 is better.\nThat is all.") == 2
    assert conclusion("Response 2 is better.\nOn reflection Response 1 is better.\n\n") == 1


def test_a_concluding_sentence_goes_before_the_rest_of_its_line():
    assert conclusion("Response 2 is better in style. So Response 1 is better.") == 1
    assert conclusion("Overall, Response 2 is better. Response 1 is better in style.") == 2


def test_an_answer_to_the_question_gives_way_to_a_verdict_on_a_response():
    assert conclusion("The answer is 2.\nResponse 1 is better.") == 1
    assert conclusion("Response 1 is better.\nThe answer is 2.") == 1
    assert conclusion("The answer is 2. Response 1 is right.") is None
    assert conclusion("Response 1 is better in style.\nTherefore the answer is 2.") == 2
    assert conclusion("Response 1 is better in style. My choice: 2.") == 2


def test_right_and_wrong_count_only_where_nothing_is_better():
    assert conclusion("I see 3. Response 1 says three. Response 2 is wrong.") == 1
    assert conclusion("Response 2 is wrong about the colour. Response 2 is better.") == 2


@pytest.mark.parametrize(
    "text",
    [
        "Response 1 is " + "clearly " * 30_000,
        "response 1 " * 30_000,
        "not that " * 30_000,
        "so the final answer is " * 20_000,
        "so I would choose " * 20_000,
        "my choice: 1" + ", " * 100_000 + "and",
        "the answer is the first response or " * 10_000,
        "\n" * 200_000,
        "a" * 300_000,
    ],
)
def test_hostile_thoughts_take_linear_time(text):
    started = time.process_time()
    assert conclusion(text) is None
    assert time.process_time() - started < 3.0


@pytest.mark.parametrize(
    "thought",
    [
        "I look.\nResponse 1 is better in style.\nSo Response 2 is better.\n",
        "Response 1 is better in style.\nResponse 2 is right.\nResponse 2 is better in fact.",
        "I look.\nOverall, Response 2 is better.\n   Response 1 is better.\nThat is all.",
        "Response 2 names the digit.\nTherefore the answer is 2.",
        "I look.\nOverall, Response 2 is better; Response 1 is better in style only.",
    ],
)
async def test_three_lines_shown_are_read_like_all_lines(thought):
    assert judge_case(text(thought, "2"), lines=3).thought.count("\n") == 0
    for answer in ("1", "2"):
        assert await values_of(text(thought, answer), lines=3) == await values_of(text(thought, answer)) != [0.0]


async def test_the_release_shows_the_judge_what_is_no_choice_too():
    untagged = "I look closely.\nSo Response 2 is better."
    assert judge_case(untagged) is None
    assert judge_case(untagged, mode="release") == JudgeCase(thought=untagged, answer=untagged)
    assert judge_case(untagged, lines=1, mode="release").thought == "So Response 2 is better."
    assert judge_case(text("a", " 3 "), mode="release").answer == "two response are the same"
    assert judge_case(text("a", "the first"), mode="release").answer == "the first"
    assert judge_case(text("a", "2"), mode="release") == judge_case(text("a", "2"))
    assert await values_of(untagged, "I look.", text("So 2 is right.", "3"), mode="release") == [1.0, 0.0, 0.0]


def text(thought: str, answer: str) -> str:
    return f"<think>{thought}</think><answer>{answer}</answer>"


async def values_of(*texts: str, **options: object) -> list[float | None]:
    scores = await consistency_rewards([sample(item) for item in texts], RulesJudge(), **options)
    return [score.value for score in scores]


async def test_consistent_is_one_contradicting_minus_one_and_undecided_zero():
    texts = (
        text("So Response 1 is better.", "1"),
        text("So Response 2 is better.", "1"),
        text("Hard to say.", "1"),
        text("", "2"),
        text("So Response 1 is better.", "neither"),
        "So Response 1 is better.",
        "1",
    )
    assert await values_of(*texts) == [1.0, -1.0, 0.0, 0.0, 0.0, 0.0, 0.0]
    assert await values_of(*texts, values="01") == [1.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0]


async def test_with_lines_the_judge_sees_the_last_lines_only():
    thought = "So Response 1 is better.\nOne more remark.\nAnd another."
    assert await values_of(text(thought, "1")) == [1.0]
    assert await values_of(text(thought, "1"), lines=3) == [1.0]
    assert await values_of(text(thought, "1"), lines=2) == [0.0]


def test_the_judges_case_has_the_answer_as_a_sentence():
    case = judge_case(text("a\nb", "2"), 1)
    assert case == JudgeCase(thought="b</think>", answer="response 2 is better")
    assert judge_case(text("a", "3")) is None


class ScriptedJudge:
    """A judge as a model service would be one: it may fail on a case, on a call, or answer nonsense."""

    def __init__(self, *verdicts: int | None, error: Exception | None = None) -> None:
        self.verdicts, self.error, self.seen = list(verdicts), error, []

    async def judge(self, cases):
        self.seen = list(cases)
        if self.error is not None:
            raise self.error
        return self.verdicts


async def test_a_failed_verdict_is_no_value_and_answers_stay_with_their_cases():
    judge = ScriptedJudge(1, None, -1)
    texts = [text("a", "1"), "no tags", text("b", "2"), text("c", "2")]
    scores = await consistency_rewards([sample(item) for item in texts], judge)
    assert [score.value for score in scores] == [1.0, 0.0, None, -1.0]
    assert scores[2].error == "the judge gave no verdict"
    assert [case.thought for case in judge.seen] == ["<think>a</think>", "<think>b</think>", "<think>c</think>"]


@pytest.mark.parametrize(
    ("judge", "message"),
    [
        (ScriptedJudge(error=ConnectionError("refused")), "the judge failed: ConnectionError('refused')"),
        (ScriptedJudge(1), "the judge gave 1 verdicts on 2 cases"),
        (ScriptedJudge(5, 5), "the judge's verdict is 5; it must be 1, 0 or -1"),
    ],
)
async def test_a_failing_judge_leaves_its_samples_unscored(judge, message):
    scores = await consistency_rewards([sample(text("a", "1")), sample(text("b", "2"))], judge)
    assert [score.value for score in scores] == [None, None]
    assert message in scores[0].error
