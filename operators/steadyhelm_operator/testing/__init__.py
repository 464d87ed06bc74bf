"""Stand-ins for tests and benchmarks: for heads, KubeRay and the Kubernetes API; and a real API server of their own.

They come with a checkout alone: no wheel and no image holds them.
"""

from steadyhelm_operator.testing.heads import FakeHead, FakeHeads, FakeJob
from steadyhelm_operator.testing.memory import READY, SUSPENDED, MemoryKubernetes

__all__ = ["READY", "SUSPENDED", "FakeHead", "FakeHeads", "FakeJob", "MemoryKubernetes"]
