"""Evaluation of a judge: votes, both orders, bias, intervals. Pure functions; the runtime makes the trajectories."""

from steadyhelm.evaluation.metrics import EvalResult, Item, evaluate
from steadyhelm.evaluation.votes import majority

__all__ = ["EvalResult", "Item", "evaluate", "majority"]
