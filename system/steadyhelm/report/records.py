"""What a report is made of: plain records, so that a page can be made and tested without a run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from steadyhelm.telemetry import MetricsLine


@dataclass(frozen=True, slots=True, kw_only=True)
class Token:
    """A piece of a completion.

    ``advantage`` is what the loss multiplied (None where the sample left the loss or nothing was trained),
    ``probability`` that of the policy that sampled it (None for traces).

    Example: ``Token(text=" better", advantage=1.21, probability=0.83)``
    """

    text: str
    advantage: float | None = None
    probability: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """A completion to show.

    ``images`` are encoded bytes. ``reward`` is None where the sample was unscored or is an evaluation's. ``parts`` are
    the reward's parts; ``detail`` is what its terms noted, with the reason under ``error`` where the sample is
    unscored. ``meta`` is the pair's. ``correct`` is None where nobody judged. ``advantage`` is the sequence's (of its
    last token), ``filtered`` says that the filter set it to zero. ``why`` says why this sample was picked.
    """

    iteration: int
    prompt_id: str
    prompt: str
    label: int
    tokens: tuple[Token, ...]
    images: tuple[bytes, ...] = ()
    finish: str = "stop"
    reward: float | None = None
    parts: Mapping[str, float] = field(default_factory=dict)
    detail: Mapping[str, Any] = field(default_factory=dict)
    meta: Mapping[str, str] = field(default_factory=dict)
    correct: bool | None = None
    advantage: float | None = None
    filtered: bool = False
    why: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """The same held-out prompt answered at the first and at the last evaluation."""

    before: Sample
    after: Sample


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """An evaluation's ``eval/…`` metrics, of the policy after ``iteration``."""

    iteration: int
    metrics: Mapping[str, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class ReportData:
    """Everything on the page.

    ``changes`` counts held-out prompts by (right before, right after) over all that both evaluations asked.
    ``notes`` are sentences about what the page leaves out or approximates.
    """

    run: str
    config: Mapping[str, Any]
    versions: Mapping[str, str] = field(default_factory=dict)
    attempts: int = 1
    metrics: tuple[MetricsLine, ...] = ()
    evaluations: tuple[Evaluation, ...] = ()
    samples: tuple[Sample, ...] = ()
    comparisons: tuple[Comparison, ...] = ()
    changes: Mapping[tuple[bool, bool], int] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
