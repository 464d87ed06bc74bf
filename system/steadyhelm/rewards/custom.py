"""Reward terms of the user's own code: loading them, and calling them so that a failure touches their samples only."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from pathlib import Path

from steadyhelm.config.reward import CustomTerm
from steadyhelm.data.code_ref import failed_at, load_code
from steadyhelm.errors import ConfigError
from steadyhelm.rewards.interface import SCOPES, RewardTerm, Sample, Scope, Score


class FunctionTerm:
    """A plain function ``(Sample) -> float`` as a term of scope ``sample``."""

    scope: Scope = "sample"

    def __init__(self, function: Callable[[Sample], float | None]) -> None:
        self._function = function

    def score(self, samples: Sequence[Sample]) -> Sequence[float | None]:
        """The function's value for each sample."""
        return [self._function(sample) for sample in samples]


def load_term(base: Path, term: CustomTerm) -> RewardTerm:
    """The term that ``term.code`` names: a function ``(Sample) -> float``, an object with ``scope`` and ``score``, or
    a class of such objects that takes no arguments.

    Raises ConfigError where it is none of these.
    """
    found = load_code(base, term.code)
    if inspect.isclass(found):
        try:
            found = found()
        except Exception as error:  # a user's constructor may raise anything
            raise ConfigError(
                f"{term.code}: making a {found.__name__} without arguments failed{failed_at(error, base)}"
            ) from error
    score = getattr(found, "score", None)
    if callable(score):
        if getattr(found, "scope", None) not in SCOPES:
            raise ConfigError(
                f"{term.code}: its scope is {getattr(found, 'scope', None)!r}; declare one of {', '.join(SCOPES)}"
            )
    elif callable(found):
        score, found = found, FunctionTerm(found)
    else:
        raise ConfigError(
            f"{term.code}: {found!r:.60} is no reward term; name a function (Sample) -> float, or an object with "
            "scope and score(samples)"
        )
    if inspect.iscoroutinefunction(score):
        raise ConfigError(f"{term.code}: it is async; a reward term is a plain function")
    return found  # type: ignore[no-any-return]  # a user's object, checked above


def score_unit(term: RewardTerm, unit: Sequence[Sample], folder: Path) -> list[Score]:
    """The term's scores of one unit of its scope, in order; never raises.

    An exception, a wrong number of values, or a value that is no finite number becomes the error of the samples that
    it concerns. ``folder`` is where the user's code lies, for the error's line.
    """
    try:
        values = list(term.score(unit))
        if len(values) != len(unit):
            raise ValueError(f"score returned {len(values)} values for {len(unit)} samples")
        return [Score.checked(value) for value in values]
    except BaseException as error:  # one of the two broad catches: a sample's scoring fails, not the run
        return [Score(value=None, error=f"it failed{failed_at(error, folder)}")] * len(unit)
