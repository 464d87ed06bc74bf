import pytest
from steadyhelm.data.pairs import checked_pairs
from steadyhelm.data.template import pairwise_prompt
from steadyhelm.data.types import PreferencePair
from steadyhelm.errors import DataError


def pair(**changes) -> PreferencePair:
    fields = {"pair_id": "p", "question": "Which?", "responses": ("one", "two"), "label": 1, "images": (b"x",)}
    return PreferencePair(**{**fields, **changes})


def check(*records: object) -> list[PreferencePair]:
    return list(checked_pairs(records, "digits.py:train_pairs"))


def test_well_formed_records_pass_in_order():
    records = [pair(pair_id="a"), pair(pair_id="b", label=2, images=(), trace="t", meta={"k": "v"})]
    assert check(*records) == records


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"label": 0}, "label is 0; label must be 1 or 2"),
        ({"label": 3}, "label is 3; label must be 1 or 2"),
        ({"label": "1"}, "label is '1'; label must be 1 or 2"),
        ({"label": True}, "label is True; label must be 1 or 2"),
        ({"label": 1.0}, r"label is 1\.0; label must be 1 or 2"),
        ({"question": ""}, "question is ''; give it a non-empty string"),
        ({"question": " \n"}, r"question is ' \\n'"),
        ({"responses": ("one",)}, r"responses is \('one',\); give it exactly two strings"),
        ({"responses": "ab"}, "responses is 'ab'; give it exactly two strings"),
        ({"responses": ("one", "")}, "response 2 is ''"),
        ({"responses": (None, "two")}, "response 1 is None"),
        ({"images": (b"x", "file.png")}, r"image 1 is 'file\.png'; give it the bytes of a PNG or JPEG file"),
        ({"images": (b"",)}, "image 0 is b''"),
        ({"images": b"raw"}, "images is b'raw'; give it a tuple of encoded images"),
        ({"trace": ""}, "trace is ''; give it the completion to imitate, or None"),
        ({"meta": {"k": 1}}, r"meta is \{'k': 1\}; give it a mapping of strings to strings"),
        ({"pair_id": 7}, "pair_id is 7; give it a non-empty string"),
    ],
)
def test_a_wrong_field_is_named_with_record_value_and_remedy(changes, message):
    with pytest.raises(DataError, match=rf"^digits\.py:train_pairs: record 1 \(pair_id .*\): {message}"):
        check(
            pair(pair_id="first"), pair(pair_id="second") if not changes else pair(**{"pair_id": "second", **changes})
        )


def test_a_record_of_another_type_is_named():
    with pytest.raises(DataError, match=r"record 0 is \{'label': 1\} \(dict\); every record must be a steadyhelm"):
        check({"label": 1})


def test_a_pair_id_that_came_before_is_named_with_both_records():
    with pytest.raises(DataError, match=r"record 2 \(pair_id 'a'\): pair_id is also record 0's; make each one unique"):
        check(pair(pair_id="a"), pair(pair_id="b"), pair(pair_id="a"))


def test_an_empty_data_set_is_refused():
    with pytest.raises(DataError, match=r"digits\.py:train_pairs: the data set is empty"):
        check()


def test_records_before_the_wrong_one_are_yielded_one_by_one():
    records = checked_pairs(iter([pair(pair_id="a"), pair(pair_id="b", label=9)]), "d.py:f")
    assert next(records).pair_id == "a"
    with pytest.raises(DataError, match="record 1"):
        next(records)


def test_the_built_in_prompt_has_role_parts_in_order_and_the_answer_format():
    text = pairwise_prompt("What {is} it?", "100 % {a}", "b")
    places = [text.index(part) for part in ("impartial", "[Question]\nWhat {is} it?", "[Response 1]\n100 % {a}")]
    places += [text.index("[Response 2]\nb"), text.index("<think>...</think><answer>1 or 2</answer>")]
    assert places == sorted(places)
    assert "no ties" in text
