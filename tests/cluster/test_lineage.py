"""The judge of a run's prompts finds what it is to find."""

from dataclasses import replace

import pytest

from tests.cluster.lineage import Lineage

RIGHT = Lineage(
    attempts=("start", "resume"),
    iterations=2,
    trained={"0:1": 1, "0:2": 1, "0:3r1": 1},
    issued=("0:1", "0:2", "0:3", "0:4"),
    other={"0:3": "replaced:0:3r1", "0:4": "dropped:stale"},
    metrics=(1, 2),
    finished=True,
)


def test_a_lineage_in_which_every_prompt_has_one_end_is_right():
    RIGHT.check()


@pytest.mark.parametrize(
    "wrong",
    [
        replace(RIGHT, trained=RIGHT.trained | {"0:1": 2}),
        replace(RIGHT, trained={"0:1": 1, "0:3r1": 1}),
        replace(RIGHT, trained=RIGHT.trained | {"0:9": 1}),
        replace(RIGHT, trained=RIGHT.trained | {"0:2r1": 1}),
        replace(RIGHT, metrics=(2,)),
    ],
    ids=["trained on twice", "lost", "never issued", "replaced without a word", "without metrics"],
)
def test_any_other_is_not(wrong: Lineage):
    with pytest.raises(AssertionError):
        wrong.check()
