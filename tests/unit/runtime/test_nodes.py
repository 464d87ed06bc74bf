import time

import ray
from ray.core.generated import autoscaler_pb2
from steadyhelm.config import RunFile
from steadyhelm.runtime.cluster import cluster
from steadyhelm.runtime.nodes import UNKNOWN_S, leaving_nodes, seconds_left

RUN = RunFile.model_validate(
    {
        "name": "nodes-test",
        "model": {"path": "unused"},
        "data": {"train": "unused.py:pairs"},
        "learner": {"train_batch": 1},
        "schedule": {"iterations": 1},
    }
)
PREEMPTION = autoscaler_pb2.DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION")


class Resident:
    def there(self) -> bool:
        return True


def test_a_deadline_is_turned_into_seconds_and_none_into_a_minute():
    left = seconds_left({"spot": 1_090_000, "late": 900_000, "scaled down": 0}, now_s=1000.0)
    assert left == {"spot": 90.0, "late": 0.0, "scaled down": UNKNOWN_S}


def test_ray_says_which_nodes_are_taken_away_and_when():
    with cluster(RUN):
        assert leaving_nodes() == {}
        member = ray.remote(num_cpus=0)(Resident).remote()  # a node without actors would go at once
        assert ray.get(member.there.remote(), timeout=120)
        context = ray.get_runtime_context()
        deadline_ms = int((time.time() + 3600) * 1000)
        client = ray._raylet.GcsClient(address=context.gcs_address)
        accepted, refusal = client.drain_node(context.get_node_id(), PREEMPTION, "a spot notice", deadline_ms)
        assert accepted, refusal
        ends = time.monotonic() + 60
        while not (found := leaving_nodes()) and time.monotonic() < ends:  # the node itself spreads the word
            time.sleep(0.05)
        (left,) = found.items()
        assert left[0] == context.get_node_id()
        assert 0 < left[1] <= 3600
        assert ray.get(member.there.remote(), timeout=120)
