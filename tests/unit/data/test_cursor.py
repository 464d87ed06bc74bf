import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from steadyhelm.data.cursor import (
    Place,
    epoch_order,
    held_out_seed,
    is_swapped,
    iteration_places,
    parse_prompt_id,
    sampling_seed,
)


def test_prompt_ids_are_written_and_read_as_documented():
    assert Place(epoch=0, index=17).prompt_id == "0:17"
    assert Place(epoch=0, index=17, sample=3).prompt_id == "0:17s3"
    assert Place(epoch=2, index=5, retry=1).prompt_id == "2:5r1"
    assert Place(epoch=2, index=5, sample=0, retry=2).prompt_id == "2:5s0r2"
    assert parse_prompt_id("2:5s0r2") == Place(epoch=2, index=5, sample=0, retry=2)
    assert parse_prompt_id("2:5s0r2").group_id == "2:5"


@given(
    epoch=st.integers(0, 10**6),
    index=st.integers(0, 10**9),
    sample=st.none() | st.integers(0, 99),
    retry=st.integers(0, 9),
)
def test_every_place_survives_its_id(epoch, index, sample, retry):
    place = Place(epoch=epoch, index=index, sample=sample, retry=retry)
    assert parse_prompt_id(place.prompt_id) == place


@pytest.mark.parametrize("text", ["eval:3", "eval:3x", "", "0:", "0:1r", "0:1r1s1", "-1:2", "0:1 "])
def test_other_ids_are_refused(text):
    with pytest.raises(ValueError, match="is not a training prompt's id"):
        parse_prompt_id(text)


def test_retries_count_up():
    assert parse_prompt_id("0:17").next_try.prompt_id == "0:17r1"
    assert parse_prompt_id("0:17r1").next_try.prompt_id == "0:17r2"
    assert parse_prompt_id("0:17s3").next_try.prompt_id == "0:17s3r1"


def test_the_order_of_an_epoch_is_fixed_by_seed_and_epoch():
    assert epoch_order(0, 0, 8).tolist() == epoch_order(0, 0, 8).tolist() == ORDER_0_0
    assert epoch_order(0, 1, 8).tolist() == ORDER_0_1
    assert epoch_order(1, 0, 8).tolist() == ORDER_1_0
    assert epoch_order(0, 3, 4, shuffle=False).tolist() == [0, 1, 2, 3]


# Philox is specified bit by bit; these must never change, or running runs would see other prompts after an update.
ORDER_0_0 = [0, 2, 1, 5, 4, 3, 6, 7]
ORDER_0_1 = [5, 3, 7, 2, 4, 1, 0, 6]
ORDER_1_0 = [3, 5, 2, 7, 0, 6, 1, 4]


def test_iterations_cut_the_endless_stream_into_equal_pieces():
    assert [place.prompt_id for place in iteration_places(1, 3, 4, seed=0, shuffle=False)] == ["0:0", "0:1", "0:2"]
    assert [place.prompt_id for place in iteration_places(2, 3, 4, seed=0, shuffle=False)] == ["0:3", "1:0", "1:1"]
    assert [place.prompt_id for place in iteration_places(2, 5, 2, seed=0, shuffle=False)] == [
        "2:1",
        "3:0",
        "3:1",
        "4:0",
        "4:1",
    ]


@settings(max_examples=50)
@given(num_records=st.integers(1, 30), per_iteration=st.integers(1, 40), seed=st.integers(0, 2**31 - 1))
def test_every_epoch_has_every_record_once_and_no_id_twice(num_records, per_iteration, seed):
    iterations = -(-3 * num_records // per_iteration)
    places = [
        place for i in range(1, iterations + 1) for place in iteration_places(i, per_iteration, num_records, seed)
    ]
    ids = [place.prompt_id for place in places]
    assert len(set(ids)) == len(ids)
    for epoch in range(3):
        indices = [place.index for place in places if place.epoch == epoch]
        assert sorted(indices) == list(range(num_records))


def test_an_iteration_before_the_first_and_an_empty_data_set_are_refused():
    with pytest.raises(ValueError, match="iteration 0 of 4 records"):
        iteration_places(0, 3, 4, seed=0)
    with pytest.raises(ValueError, match="iteration 1 of 0 records"):
        iteration_places(1, 3, 0, seed=0)


def test_seeds_are_63_bit_hashes_of_all_their_counters():
    base = Place(epoch=1, index=2, sample=3, retry=0)
    others = [
        sampling_seed(7, base),
        sampling_seed(8, base),
        sampling_seed(7, Place(epoch=2, index=2, sample=3)),
        sampling_seed(7, Place(epoch=1, index=3, sample=3)),
        sampling_seed(7, Place(epoch=1, index=2, sample=2)),
        sampling_seed(7, base.next_try),
        held_out_seed(7, 2, False),
        held_out_seed(7, 2, True),
    ]
    assert len(set(others)) == 8
    assert all(0 <= seed < 2**63 for seed in others)
    assert sampling_seed(7, base) == 6021993184753233501


def test_half_of_the_records_are_swapped_and_another_half_in_the_next_epoch():
    first = [is_swapped(0, 0, index) for index in range(10_000)]
    second = [is_swapped(0, 1, index) for index in range(10_000)]
    assert 4_850 < sum(first) < 5_150
    assert 4_850 < sum(a != b for a, b in zip(first, second, strict=True)) < 5_150
