import pytest
from hypothesis import given
from hypothesis import strategies as st
from steadyhelm.data.types import ImageKey, Prompt, PromptId
from steadyhelm.runtime.load import LoadMeter
from steadyhelm.runtime.routing import MARGIN, Candidate, Memory, Work, choose, marks

candidates = st.lists(
    st.builds(
        Candidate, number=st.integers(0, 99), tokens=st.floats(0, 1e6), known=st.sampled_from([0.0, 0.25, 0.5, 1.0])
    ),
    min_size=1,
    max_size=8,
    unique_by=lambda candidate: candidate.number,
)


def at(number: int, tokens: float, known: float = 0.0) -> Candidate:
    return Candidate(number=number, tokens=tokens, known=known)


@pytest.mark.parametrize(
    ("members", "chosen"),
    [
        ([at(0, 100), at(1, 40), at(2, 60)], 1),
        ([at(0, 0), at(1, 0)], 0),
        ([at(0, 0), at(1, 0, known=0.5), at(2, 0, known=0.25)], 1),
        ([at(0, 0), at(1, 50, known=1.0)], 1),  # within half of the new work
        ([at(0, 0), at(1, 51, known=1.0)], 0),  # more than that: rather prepare the images again
        ([at(0, 30, known=1.0), at(1, 20, known=1.0)], 1),
    ],
)
def test_work_goes_to_the_least_loaded_unless_one_as_good_as_that_knows_it(members: list[Candidate], chosen: int):
    assert choose(members, tokens=100) == chosen


@given(candidates, st.floats(0, 1e6))
def test_whoever_is_chosen_has_little_more_than_the_least_and_knows_most_of_such(members, tokens):
    chosen = next(c for c in members if c.number == choose(members, tokens))
    least = min(c.tokens for c in members)
    assert chosen.tokens <= least + MARGIN * tokens
    assert chosen.known >= max(c.known for c in members if c.tokens == least)


@given(candidates, st.floats(0, 1e6), st.randoms())
def test_the_choice_does_not_depend_on_the_members_order(members, tokens, random):
    shuffled = members[:]
    random.shuffle(shuffled)
    assert choose(shuffled, tokens) == choose(members, tokens)


def prompt(name: str, text: str, *images: str) -> Prompt:
    keys = tuple(ImageKey(image) for image in images)
    return Prompt(
        prompt_id=PromptId(name), group_id=name, text=text, images=keys, label=1, swapped=False, seed=0, pair_id=name
    )


def test_samples_of_a_prompt_have_the_same_marks_and_other_prompts_on_its_image_share_the_image():
    first, again = marks([prompt("0:1s0", "Which?", "images/a")]), marks([prompt("0:1s1", "Which?", "images/a")])
    other = marks([prompt("0:2", "Where?", "images/a")])
    assert first == again
    assert first & other == {"images/a"}
    assert len(first | other) == 3


def test_a_memory_knows_what_it_met_and_forgets_the_oldest(monkeypatch):
    memory = Memory()
    assert memory.known(frozenset()) == 0.0
    memory.meet(f"images/{n}" for n in range(5000))
    assert memory.known({"images/4999"}) == 1.0
    assert memory.known({"images/4999", "images/0"}) == 0.5
    memory.meet(["images/904"])
    memory.meet(["images/new"])
    assert memory.known({"images/904"}) == 1.0
    assert memory.known({"images/905"}) == 0.0


def test_a_meter_says_how_saturated_the_members_were_over_time():
    now = [0.0]
    meter = LoadMeter(lambda: now[0])
    whole, small = Work(samples=8, tokens=800.0), Work(samples=2, tokens=200.0)
    meter.note([0, 0], [], 0)
    now[0] = 1.0
    meter.note([16, 2], [whole, whole, small], 1)  # one has two whole orders, the other a quarter of one
    now[0] = 3.0
    meter.note([0, 0], [], 0)
    now[0] = 4.0
    assert meter.glance() == meter.glance()
    load = meter.read()
    assert load.saturation == pytest.approx((2 * 1.0 + 2 * 0.25) / (4 * 2))
    assert load.in_flight_tokens == pytest.approx(2 * 1800 / 4)
    assert load.at_hand == 4
    now[0] = 5.0
    again = meter.read()
    assert (again.saturation, again.in_flight_tokens, again.at_hand) == (0.0, 0.0, 0)
