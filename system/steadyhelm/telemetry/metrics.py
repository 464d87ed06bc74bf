"""The names of all metrics, each with its meaning, unit and kind: one line declares one metric.

A name is ``"<group>/<what>"``. Open groups (``reward/<part>``, ``seconds/<phase>``, …) take names that a run file or a
service brings; ``describe`` answers for those too. Prometheus names are derived, never written down.

Example: ``metrics[REWARD_MEAN] = 1.25``; ``metrics[reward_part("length")] = 0.5``; ``prometheus_name(LOSS)``
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

Kind = Literal["gauge", "counter"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Metric:
    """What a metric means.

    ``unit`` is ``""`` for a plain number, ``ratio`` for a share in [0, 1]. ``exact`` is False where the value depends
    on clocks or on what happened to the process, so that a resumed run cannot repeat it.
    """

    name: str
    help: str
    unit: str = ""
    kind: Kind = "gauge"
    exact: bool = True


METRICS: dict[str, Metric] = {}
"""Every metric of a fixed name."""


def _metric(name: str, text: str, unit: str = "", kind: Kind = "gauge", exact: bool = True) -> str:
    assert name not in METRICS
    METRICS[name] = Metric(name=name, help=text, unit=unit, kind=kind, exact=exact)
    return name


# Reward, means over the valid samples of the iteration
REWARD_MEAN = _metric("reward/mean", "Mean total reward of the valid samples")
REWARD_STD = _metric("reward/std", "Standard deviation of the total reward over the valid samples")
REWARD_FORMAT = _metric("reward/format", "Mean format reward")
REWARD_CHOICE = _metric("reward/choice", "Mean choice reward: share of right answers where it scores 0 or 1")
REWARD_CONSISTENCY = _metric("reward/consistency", "Mean consistency reward")
REWARD_VALID_RATE = _metric("reward/valid_rate", "Share of samples that could be scored", "ratio")

# Learner, means over the optimiser steps of the iteration unless the name says otherwise
LOSS = _metric("learner/loss", "Loss")
GRAD_NORM = _metric("learner/grad_norm", "Global L2 norm of the gradient before it is scaled down")
LR = _metric("learner/lr", "Learning rate of the iteration's last optimiser step")
ENTROPY = _metric("learner/entropy", "Entropy of the sampling distribution per completion token", "nats")
KL = _metric("learner/kl", "Mean of log proximal - log reference per token (k1)", "nats")
PRE_CLIP_HITS = _metric("learner/pre_clip_hits", "Share of tokens whose log-ratio the Pre-CLIP clamped", "ratio")
CLIP_FRACTION = _metric("learner/clip_fraction", "Share of tokens where the PPO clip took the gradient away", "ratio")
RATIO_MEAN = _metric("learner/ratio_mean", "Mean ratio of the current to the proximal policy per token")
POLICY_KL = _metric("learner/policy_kl", "Mean k3 divergence of the current from the proximal policy per token", "nats")
FILTER_LOW = _metric(
    "learner/filter_low", "Share of tokens whose advantage the filter dropped below its bound", "ratio"
)
FILTER_HIGH = _metric("learner/filter_high", "Share of tokens whose advantage the filter dropped above", "ratio")
LOGPROB_GAP_MEAN = _metric("learner/logprob_gap_mean", "Mean |log proximal - log behaviour| per token", "nats")
LOGPROB_GAP_MAX = _metric("learner/logprob_gap_max", "Largest |log proximal - log behaviour| of a token", "nats")
CORRECTION_MEAN = _metric("learner/correction_mean", "Mean importance weight between behaviour and proximal policy")
CORRECTION_CAPPED = _metric("learner/correction_capped", "Share of importance weights at their cap", "ratio")
ADVANTAGE_MEAN = _metric("learner/advantage_mean", "Mean raw advantage before normalisation")
ADVANTAGE_STD = _metric("learner/advantage_std", "Standard deviation of the raw advantage before normalisation")
LEARNER_STEPS = _metric("learner/steps", "Optimiser steps of the iteration")
LEARNER_TOKENS = _metric("learner/tokens", "Completion tokens trained on", "tokens")
LEARNER_TOKENS_PER_S = _metric(
    "learner/tokens_per_s", "Completion tokens per second of stepping", "tokens/s", exact=False
)

# Rollout
LENGTH_MEAN = _metric("rollout/length_mean", "Mean completion length", "tokens")
LENGTH_MAX = _metric("rollout/length_max", "Longest completion", "tokens")
TRUNCATED_RATE = _metric("rollout/truncated_rate", "Share of completions cut at max_new_tokens", "ratio")
ROLLOUT_SAMPLES = _metric("rollout/samples", "Completions sampled")
ROLLOUT_TOKENS = _metric("rollout/tokens", "Completion tokens sampled", "tokens")
ROLLOUT_TOKENS_PER_S = _metric(
    "rollout/tokens_per_s", "Completion tokens per second while an engine generates", "tokens/s", exact=False
)
REFERENCE_TOKENS_PER_S = _metric(
    "reference/tokens_per_s", "Completion tokens scored per second of the reference's passes", "tokens/s", exact=False
)
REWARD_SAMPLES_PER_S = _metric(
    "reward_service/samples_per_s", "Completions per second while the reward service scores", "1/s", exact=False
)
STALENESS_MEAN = _metric("staleness/mean", "Mean age of the sampling policy at the step", "versions")
STALENESS_MAX = _metric("staleness/max", "Age of the oldest sampling policy at the step", "versions")
STALENESS_DROPPED = _metric(
    "staleness/dropped", "Samples that were dropped, since their prompt had a token older than allowed"
)

# Engines: all of clocks
LEARNER_WAIT = _metric(
    "learner/wait_share", "Share of the iteration in which the learner waited for its batch", "ratio", exact=False
)
INPUT_WAIT = _metric(
    "learner/input_share",
    "Share of the iteration in which the learner read its batch's objects or waited for a prepared micro-batch",
    "ratio",
    exact=False,
)
PREFETCHED = _metric(
    "learner/prefetched",
    "Share of the batch's bytes that the learner had read before the batch was committed",
    "ratio",
    exact=False,
)
ENGINES_SERVING = _metric("scaling/serving", "Engines that take work", exact=False)
ENGINES_DESIRED = _metric(
    "scaling/desired", "Engines that there should be, as decided behind the iteration", exact=False
)
SATURATION = _metric(
    "scaling/saturation", "Mean share of a whole shard that an engine had in hand, at most 1 each", "ratio", exact=False
)
IN_FLIGHT_TOKENS = _metric(
    "scaling/in_flight_tokens", "Mean of the tokens expected of all shards that engines had", "tokens", exact=False
)
QUEUE = _metric("scaling/queue", "Most shards that were sent or waiting at once, per engine", exact=False)

# Time
ITERATION_SECONDS = "seconds/iteration"  # of the open group "seconds": the iteration's wall time
OVERHEAD_SHARE = _metric(
    "overhead/share", "Share of the iteration's wall time in which nothing computes", "ratio", exact=False
)

# Evaluation
EVAL_ACCURACY = _metric("eval/accuracy", "Share of right answers, averaged over both orders", "ratio")
EVAL_ACCURACY_LOW = _metric("eval/accuracy_low", "Lower bound of the accuracy's 95 % interval", "ratio")
EVAL_ACCURACY_HIGH = _metric("eval/accuracy_high", "Upper bound of the accuracy's 95 % interval", "ratio")
EVAL_BOTH_ORDERS = _metric("eval/both_orders", "Share of pairs answered rightly in both orders", "ratio")
EVAL_BOTH_ORDERS_LOW = _metric("eval/both_orders_low", "Lower bound of that share's 95 % interval", "ratio")
EVAL_BOTH_ORDERS_HIGH = _metric("eval/both_orders_high", "Upper bound of that share's 95 % interval", "ratio")
EVAL_ALWAYS_FIRST = _metric("eval/always_first", "Accuracy of a judge that always chooses the first response", "ratio")
EVAL_FIRST_SLOT = _metric("eval/first_slot", "Share of answers that chose the first response; 0.5 is unbiased", "ratio")
EVAL_UNPARSABLE = _metric("eval/unparsable", "Share of completions without a readable answer", "ratio")
EVAL_FORMAT = _metric("eval/format", "Share of completions in the asked format", "ratio")
EVAL_CONSISTENCY = _metric("eval/consistency", "Share of completions whose thought concludes their answer", "ratio")
EVAL_TRUNCATED = _metric("eval/truncated", "Share of completions cut at the token limit", "ratio")
EVAL_PAIRS = _metric("eval/pairs", "Held-out pairs evaluated")

# Run
REPLAYED = _metric(
    "run/replayed_iterations", "Iterations that this driver stepped again from committed batches", "", "counter", False
)
RESTARTS = _metric(
    "run/restarts", "Actors that this driver replaced and learner groups that it started again", "", "counter", False
)
WEIGHTS_BYTES = _metric(  # a replayed iteration publishes nothing
    "weights/bytes", "Bytes published for a policy version", "bytes", exact=False
)
WEIGHTS_SYNC_SECONDS = _metric(
    "weights/sync_seconds", "From the end of a step until every engine serves its weights", "seconds", exact=False
)
WEIGHTS_PAUSE_SECONDS = _metric(
    "weights/pause_seconds", "Longest pause of an engine to swap new weights in", "seconds", exact=False
)
WEIGHTS_PAUSE_SHARE = _metric(
    "weights/pause_share", "That pause as a share of the iteration's wall time", "ratio", exact=False
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """A group of metrics that is open for names: ``"<prefix>/<rest>"``; ``rest`` becomes a Prometheus label."""

    prefix: str
    label: str
    metric: Metric


FAMILIES = {
    family.prefix: family
    for family in (
        Family(
            prefix="reward",
            label="part",
            metric=Metric(name="reward/part", help="Mean of a reward part over the samples where it is valid"),
        ),
        Family(
            prefix="seconds",
            label="phase",
            metric=Metric(
                name="phase/seconds", help="Seconds in which a phase was under way", unit="seconds", exact=False
            ),
        ),
        Family(
            prefix="outcomes",
            label="outcome",
            metric=Metric(name="outcomes/prompts", help="Prompts of the iteration that ended in this outcome"),
        ),
    )
}
"""Every open group."""


def reward_part(part: str) -> str:
    """The metric of the reward part ``part``: ``"reward/<part>"``."""
    return f"reward/{part}"


def outcome(kind: str) -> str:
    """The metric of the prompts that ended in ``kind`` (``"trained"``, ``"unscored"``): ``"outcomes/<kind>"``."""
    return f"outcomes/{kind}"


def seconds(phase: str) -> str:
    """The metric of the time that ``phase`` (``"rollout"``, ``"learner.backward"``) took: ``"seconds/<phase>"``."""
    return f"seconds/{phase}"


def describe(name: str) -> Metric:
    """Meaning, unit and kind of the metric ``name``. Raises KeyError for a name of no group."""
    if name in METRICS:
        return METRICS[name]
    family = FAMILIES[name.partition("/")[0]].metric
    return Metric(name=name, help=family.help, unit=family.unit, kind=family.kind, exact=family.exact)


def exact(metrics: Mapping[str, float]) -> dict[str, float]:
    """Those of ``metrics`` that a resumed run repeats bit for bit: none of clocks, restarts and replays."""
    return {name: value for name, value in metrics.items() if describe(name).exact}


_SUFFIX = {"ratio": "ratio", "tokens": "tokens", "seconds": "seconds", "bytes": "bytes", "nats": "nats"}


def prometheus_name(name: str) -> tuple[str, dict[str, str]]:
    """The Prometheus name and labels of a metric.

    Example: ``prometheus_name("learner/kl") == ("steadyhelm_learner_kl_nats", {})`` and
    ``prometheus_name("seconds/rollout") == ("steadyhelm_phase_seconds", {"phase": "rollout"})``
    """
    labels: dict[str, str] = {}
    metric = describe(name)
    stem = name
    if name not in METRICS:
        prefix, _, rest = name.partition("/")
        labels, stem = {FAMILIES[prefix].label: rest}, FAMILIES[prefix].metric.name
    stem = "steadyhelm_" + re.sub(r"[^a-z0-9]+", "_", stem)
    suffix = _SUFFIX.get(metric.unit, "")
    if suffix and not stem.endswith("_" + suffix):
        stem = f"{stem}_{suffix}"
    return stem, labels
