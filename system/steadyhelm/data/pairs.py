"""Checks of preference records: the first wrong one ends the run with its place, its value and the remedy."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from steadyhelm.data.types import PreferencePair
from steadyhelm.errors import DataError

_REPR_LIMIT = 60


def checked_pairs(records: Iterable[object], source: str) -> Iterator[PreferencePair]:
    """Yields the records of the data set ``source`` (``digits.py:train_pairs``), each checked, in order.

    Holds one record at a time, so a data set may load its images on access. Raises DataError at the first wrong
    record, at a ``pair_id`` that came before, and at the end of an empty data set.
    """
    seen: dict[str, int] = {}
    for index, record in enumerate(records):
        pair = check_pair(record, index, source)
        if pair.pair_id in seen:
            raise _wrong(
                source, index, pair.pair_id, f"pair_id is also record {seen[pair.pair_id]}'s", "make each one unique"
            )
        seen[pair.pair_id] = index
        yield pair
    if not seen:
        raise DataError(f"{source}: the data set is empty; it must yield at least one PreferencePair")


def check_pair(record: object, index: int, source: str) -> PreferencePair:
    """``record`` where it is a well-formed ``PreferencePair``. Raises DataError naming record, value and remedy."""
    if not isinstance(record, PreferencePair):
        raise DataError(
            f"{source}: record {index} is {_short(record)} ({type(record).__name__}); "
            "every record must be a steadyhelm.data.types.PreferencePair"
        )
    for problem, remedy in _problems(record):
        raise _wrong(source, index, record.pair_id, problem, remedy)
    return record


def _problems(pair: Any) -> Iterator[tuple[str, str]]:
    """What is wrong with a record, with its remedy; ``Any``, since a user's values may be of any type."""
    if not _is_text(pair.pair_id):
        yield f"pair_id is {_short(pair.pair_id)}", "give it a non-empty string"
    if not _is_text(pair.question):
        yield f"question is {_short(pair.question)}", "give it a non-empty string"
    if not isinstance(pair.responses, tuple | list) or len(pair.responses) != 2:
        yield f"responses is {_short(pair.responses)}", "give it exactly two strings"
    for slot, response in enumerate(pair.responses, start=1):
        if not _is_text(response):
            yield f"response {slot} is {_short(response)}", "give it a non-empty string"
    if type(pair.label) is not int or pair.label not in (1, 2):
        yield f"label is {_short(pair.label)}", "label must be 1 or 2, the better response"
    if not isinstance(pair.images, tuple | list):
        yield f"images is {_short(pair.images)}", "give it a tuple of encoded images, () where there is none"
    for number, image in enumerate(pair.images):
        if not isinstance(image, bytes) or not image:
            yield f"image {number} is {_short(image)}", "give it the bytes of a PNG or JPEG file"
    if pair.trace is not None and not _is_text(pair.trace):
        yield f"trace is {_short(pair.trace)}", "give it the completion to imitate, or None"
    if not isinstance(pair.meta, Mapping) or any(
        not isinstance(item, str) for entry in pair.meta.items() for item in entry
    ):
        yield f"meta is {_short(pair.meta)}", "give it a mapping of strings to strings"


def _wrong(source: str, index: int, pair_id: object, problem: str, remedy: str) -> DataError:
    return DataError(f"{source}: record {index} (pair_id {_short(pair_id)}): {problem}; {remedy}")


def _is_text(value: object) -> bool:
    return isinstance(value, str) and bool(value.strip())


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= _REPR_LIMIT else text[: _REPR_LIMIT - 3] + "..."
