import numpy as np
import pytest
from pydantic import ValidationError
from steadyhelm.config.reward import ChoiceTerm, ConsistencyTerm, CustomTerm, FormatTerm, Reward
from steadyhelm.rewards.composition import combine

SPEC_TABLE = [  # spec §2.5: format, choice, consistency, reward
    (1, 1, +1, 2.0),
    (1, 1, 0, 1.5),
    (1, 1, -1, 1.0),
    (1, 0, +1, 0.5),
    (1, 0, 0, 0.5),
    (1, 0, -1, 0.5),
    (0, 1, +1, 1.5),
    (0, 1, 0, 1.0),
    (0, 1, -1, 0.5),
    (0, 0, +1, 0.0),
    (0, 0, 0, 0.0),
    (0, 0, -1, 0.0),
]


def array(*values: float) -> np.ndarray:
    return np.array(values, dtype=np.float32)


def test_the_papers_table_row_by_row():
    rows = np.array(SPEC_TABLE, dtype=np.float32)
    components = {"format": rows[:, 0], "choice": rows[:, 1], "consistency": rows[:, 2]}
    assert combine(components, Reward()).tolist() == rows[:, 3].tolist()


def test_a_sum_adds_weighted_components():
    config = Reward(
        combine="sum", terms=(FormatTerm(weight=0.25), ChoiceTerm(weight=2.0), ConsistencyTerm(weight=-1.0))
    )
    total = combine({"format": array(1, 0), "choice": array(1, 1), "consistency": array(1, -1)}, config)
    assert total.tolist() == [1.25, 3.0]


def test_custom_terms_are_added_weighted_in_both_combinations():
    terms = (FormatTerm(), ChoiceTerm(), ConsistencyTerm(), CustomTerm(name="brief", code="t.py:f", weight=-0.1))
    components = {"format": array(1), "choice": array(1), "consistency": array(1), "brief": array(5)}
    assert combine(components, Reward(terms=terms)).tolist() == [1.5]
    assert combine(components, Reward(terms=terms, combine="sum")).tolist() == [1.5]
    alone = Reward(terms=(CustomTerm(name="brief", code="t.py:f", weight=3.0),))
    assert combine({"brief": array(0.5, 2)}, alone).tolist() == [1.5, 6.0]


def test_without_a_consistency_term_a_right_answer_is_worth_its_weight():
    config = Reward(terms=(FormatTerm(), ChoiceTerm()))
    assert combine({"format": array(1, 1), "choice": array(1, 0)}, config).tolist() == [1.5, 0.5]


def test_a_missing_component_is_never_multiplied_away():
    nan = float("nan")
    total = combine({"format": array(1, nan), "choice": array(0, 1), "consistency": array(nan, 1)}, Reward())
    assert np.isnan(total).tolist() == [True, True]


def test_consistency_without_choice_is_refused_where_it_would_have_no_effect():
    terms = (FormatTerm(), ConsistencyTerm())
    with pytest.raises(ValidationError, match=r"no choice term: add one, or set reward\.combine to 'sum'"):
        Reward(terms=terms)
    assert Reward(terms=terms, combine="sum").terms == terms
