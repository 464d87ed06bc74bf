"""Stand-ins for tests and benchmarks: heads of Ray clusters, KubeRay, a Kubernetes API in memory; and a real API server.

They come with a checkout alone: no wheel and no image holds them.
"""

from steadyhelm_operator.testing.heads import FakeHead, FakeHeads, FakeJob
from steadyhelm_operator.testing.memory import READY, SUSPENDED, MemoryKubernetes

__all__ = ["READY", "SUSPENDED", "FakeHead", "FakeHeads", "FakeJob", "MemoryKubernetes"]
