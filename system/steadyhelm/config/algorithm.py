"""The ``algorithm`` part: which objective is minimised, with every switch between the paper and its release."""

from __future__ import annotations

import math
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from steadyhelm.config.base import Part


class Filter(Part):
    """Which normalised advantages are set to zero (paper §4.2; release replay_buffer.py)."""

    mode: Literal["paper", "release", "none"] = "paper"
    """``paper``: keep |z| ≤ k. ``release``: keep z within raw mean ± k, then zero |z| > guard and non-finite values."""
    k: Annotated[float, Field(gt=0)] = 3.0
    """Half-width of the kept interval: standard deviations (``paper``), added to the raw mean (``release``)."""
    guard: Annotated[float, Field(gt=0)] = 10.0
    """Second bound on |z|, used by ``release`` only."""


class PreClip(Part):
    """Clamp of the log-ratio before it is exponentiated (paper §4.1, Algorithm 1)."""

    enabled: bool = True
    """Whether the log-ratio is clamped at all."""
    min: Annotated[float, Field(gt=0, lt=1)] = 1.0e-3
    """Smallest ratio; the log-ratio is clamped at its natural logarithm."""
    max: Annotated[float, Field(gt=1)] = 1.0e3
    """Largest ratio; the log-ratio is clamped at its natural logarithm."""

    @property
    def log_bounds(self) -> tuple[float, float]:
        """Lower and upper bound of the log-ratio; infinite where the clamp is off."""
        return (math.log(self.min), math.log(self.max)) if self.enabled else (-math.inf, math.inf)


class Kl(Part):
    """How the divergence from the reference policy enters; weighted by ``beta``."""

    estimator: Literal["k1", "k3"] = "k1"
    """``k1``: log π − log π_ref. ``k3``: exp(−k1) − 1 + k1."""
    placement: Literal["reward", "loss"] = "reward"
    """``reward``: subtracted from each token's reward (the paper's family). ``loss``: added to the loss (GRPO)."""


class Correction(Part):
    """Importance sampling between the behaviour policy (the engine) and the trainer's proximal policy."""

    mode: Literal["auto", "off", "token", "sequence"] = "auto"
    """``token``: one weight per token. ``sequence``: one weight per completion, from the summed log-ratio. ``auto``:
    ``token`` where ``schedule.max_staleness`` is above 0, else ``off``."""
    cap: Annotated[float, Field(ge=1)] = 2.0
    """Upper bound of the weight."""
    beyond: Literal["truncate", "mask"] = "truncate"
    """``truncate``: a weight above ``cap`` becomes ``cap``. ``mask``: tokens (completions, where ``mode`` is
    ``sequence``) whose weight is outside [1/``cap``, ``cap``] leave the loss (masked importance sampling, IcePop)."""

    def weighs(self, *, ahead: bool) -> Literal["off", "token", "sequence"]:
        """The mode without ``auto``; ``ahead`` says whether rollouts may run ahead of the learner."""
        if self.mode == "auto":
            return "token" if ahead else "off"
        return self.mode


class Objective(Part):
    """What all policy-gradient objectives share."""

    beta: Annotated[float, Field(ge=0)] = 0.0
    """Weight of the divergence from the reference policy; 0 builds no reference service at all."""
    kl: Kl = Kl()
    """Estimator and place of that divergence."""
    clip: Annotated[float, Field(gt=0, lt=1)] = 0.2
    """ε of the PPO clip: the ratio's lower bound is 1 − ε."""
    clip_high: Annotated[float, Field(gt=0)] | None = None
    """Upper ε where it is larger (clip-higher); None uses ``clip`` on both sides."""
    pre_clip: PreClip = PreClip(enabled=False)
    """Clamp of the log-ratio before the exponential."""
    filter: Filter = Filter(mode="none")
    """Filter of the normalised advantages."""
    aggregation: Literal["sequence", "token", "constant"] = "sequence"
    """``sequence``: mean over a sequence's tokens, then over sequences. ``token``: mean over all tokens.
    ``constant``: sum over tokens divided by ``max_new_tokens``, then mean over sequences (Dr.GRPO)."""
    correction: Correction = Correction()
    """Importance weights for engines whose log-probs differ from the trainer's, or that ran ahead."""
    epochs: Annotated[int, Field(ge=1)] = 1
    """Passes over an iteration's batch."""

    @model_validator(mode="after")
    def _clip_range(self) -> Self:
        if self.clip_high is not None and self.clip_high < self.clip:
            raise ValueError(
                f"algorithm.clip_high is {self.clip_high}, below algorithm.clip, which is {self.clip}: raise the "
                "former or lower the latter"
            )
        return self


class _Returns(Objective):
    """Objectives on discounted returns with global normalisation (Reinforce++ and StableReinforce)."""

    gamma: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Discount per token of the return."""
    reward_clip: Annotated[float, Field(gt=0)] = 10.0
    """A sample's total reward is clamped to ± this."""
    normalization: Literal["paper", "release"] = "paper"
    """``paper``: (A − μ)/(σ + 1e-8). ``release``: (A − μ)·rsqrt(max(σ², 1e-8)) + 1e-8."""
    weighting: Literal["token", "sequence"] = "token"
    """Whether μ and σ count every token once, or every sequence once."""


class StableReinforce(_Returns):
    """StableReinforce: Reinforce++ with Pre-CLIP and the 3-sigma advantage filter (R1-Reward, §4)."""

    type: Literal["stable_reinforce"] = "stable_reinforce"
    """Discriminator."""
    pre_clip: PreClip = PreClip()
    """Clamp of the log-ratio before the exponential."""
    filter: Filter = Filter()
    """Filter of the normalised advantages."""


class ReinforcePP(_Returns):
    """Reinforce++: global normalisation, PPO clip, no Pre-CLIP, no filter."""

    type: Literal["reinforce_pp"] = "reinforce_pp"
    """Discriminator."""


class Grpo(Objective):
    """GRPO: advantages are rewards centred and scaled within the group of one prompt's samples.

    They are divided by the deviation whose variance divides by n − 1 (the unbiased one), plus 1e-8; its paper does not
    say which is meant.
    """

    type: Literal["grpo"] = "grpo"
    """Discriminator."""
    kl: Kl = Kl(estimator="k3", placement="loss")
    """Estimator and place of the divergence from the reference policy."""


class DrGrpo(Objective):
    """Dr.GRPO: advantages are rewards centred within the group, not scaled; token sums over a constant length."""

    type: Literal["dr_grpo"] = "dr_grpo"
    """Discriminator."""
    aggregation: Literal["sequence", "token", "constant"] = "constant"
    """Denominator of the loss."""


class Rloo(Objective):
    """RLOO: each sample's baseline is the mean reward of its group's other samples."""

    type: Literal["rloo"] = "rloo"
    """Discriminator."""


class Sft(Part):
    """Supervised fine-tuning: cross-entropy on the data set's traces, through the same batches and learner."""

    type: Literal["sft"] = "sft"
    """Discriminator."""
    aggregation: Literal["sequence", "token"] = "token"
    """``token``: mean over the mini-batch's completion tokens. ``sequence``: mean per sequence first."""


PolicyGradient = StableReinforce | ReinforcePP | Grpo | DrGrpo | Rloo
Algorithm = Annotated[StableReinforce | ReinforcePP | Grpo | DrGrpo | Rloo | Sft, Field(discriminator="type")]
GROUPED = (Grpo, DrGrpo, Rloo)
"""The objectives whose advantages need more than one sample per prompt."""
