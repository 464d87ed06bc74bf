"""The learner: StableReinforce, its neighbours and supervised fine-tuning on DeepSpeed ranks.

``rank`` has the service's methods; ``training`` one iteration, ``targets`` its losses, ``plan`` who computes what;
``engine`` and ``fragments`` are DeepSpeed; ``checkpoint`` and ``batch`` the store.
"""

from steadyhelm.services.learner.rank import LearnerRank, LearnerSpec

__all__ = ["LearnerRank", "LearnerSpec"]
