"""The built-in pairwise judge prompt, used where the run file names no template of its own."""

from __future__ import annotations

_ROLE = (
    "You are a careful and impartial judge. You are given a question about the image, if there is one, and two "
    "responses to it. Decide which response serves the person who asked better."
)
_STEPS = (
    "First compare the two responses between <think> and </think>: check each against the image and the question, "
    "weigh their strengths and faults, and end with the one that is better. There are no ties; if they seem equal, "
    "still pick the one you would rather receive.\n"
    "Then give only the number of the better response, 1 or 2, between <answer> and </answer>."
)
_FORMAT = (
    "Write exactly this, with nothing before, between or after the tags:\n<think>...</think><answer>1 or 2</answer>"
)


def pairwise_prompt(question: str, response_1: str, response_2: str) -> str:
    """The user message that asks for a comparison of two responses in the R1-Reward format (paper, Table 1, restated).

    The parts are joined, not formatted, so braces and percent signs in them stay as they are.
    """
    return "\n\n".join(
        (
            _ROLE,
            _STEPS,
            f"[Question]\n{question}",
            f"[Response 1]\n{response_1}",
            f"[Response 2]\n{response_2}",
            _FORMAT,
        )
    )
