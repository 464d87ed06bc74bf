"""Rewards: format, choice, consistency and terms of the user's own, and how they become one number per sample."""

from steadyhelm.rewards.interface import RewardTerm, Sample, Scope, Score

__all__ = ["RewardTerm", "Sample", "Scope", "Score"]
