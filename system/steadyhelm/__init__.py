"""Steadyhelm trains reasoning reward models by reinforcement learning, from a laptop to a cluster."""

__version__ = "0.1.0"
