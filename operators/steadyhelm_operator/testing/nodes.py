"""Nodes that KWOK plays, under the real controllers and scheduler: pods on them run without running anything."""

from __future__ import annotations

import contextlib
import json
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from steadyhelm_operator.testing.server import Api, ended

READY_S = 120.0
PODS = 110
"""Pods that a node takes, the kubelet's own default."""
PLAYED = "kwok.x-k8s.io/node"
"""Annotation of nodes that KWOK plays, and key of their taint."""
TOLERATION = {"key": PLAYED, "operator": "Exists", "effect": "NoSchedule"}
"""What lets a pod onto such a node."""


def _stage(name: str, kind: str, expressions: list[dict[str, Any]], then: dict[str, Any]) -> dict[str, Any]:
    return {
        "apiVersion": "kwok.x-k8s.io/v1alpha1",
        "kind": "Stage",
        "metadata": {"name": name},
        "spec": {
            "resourceRef": {"apiGroup": "v1", "kind": kind},
            "selector": {"matchExpressions": expressions},
            "next": then,
        },
    }


_ENDS = ".metadata.deletionTimestamp"
_READY = '.status.conditions.[] | select( .type == "Ready" ) | .status'
STAGES = (
    _stage(
        "node",
        "Node",
        [{"key": _READY, "operator": "NotIn", "values": ["True"]}],
        {
            "statusTemplate": """
conditions:
{{ range NodeConditions }}
- {type: {{ .type | Quote }}, status: {{ .status | Quote }}, reason: {{ .reason | Quote }}, message: played}
{{ end }}
"""
        },
    ),
    _stage(
        "pod",
        "Pod",
        [{"key": _ENDS, "operator": "DoesNotExist"}, {"key": ".status.phase", "operator": "In", "values": ["Pending"]}],
        {
            "statusTemplate": """
phase: Running
startTime: {{ Now | Quote }}
conditions:
- {type: Initialized, status: "True"}
- {type: ContainersReady, status: "True"}
- {type: Ready, status: "True", lastTransitionTime: {{ Now | Quote }}}
containerStatuses:
{{ range .spec.containers }}
- {name: {{ .name | Quote }}, image: {{ .image | Quote }}, imageID: "", ready: true, restartCount: 0}
{{ end }}
"""
        },
    ),
    _stage("end", "Pod", [{"key": _ENDS, "operator": "Exists"}], {"delete": True}),
)
"""What KWOK does: a node gets Ready, a pod on it runs, one that is to end is gone."""


@contextlib.contextmanager
def nodes(programs: Path, kwok: Path, admin: Api, folder: Path, number: int) -> Iterator[None]:
    """Has ``number`` nodes under an API server that ``api_server`` started with the same folder.

    Args:
        programs: with kube-controller-manager and kube-scheduler.
        kwok: its executable.
        admin: who asks the API server as its administrator, as all of these do.
        folder: of the API server's files; theirs and their logs go there, too.
        number: of nodes, each with room for ``PODS`` pods.
    """
    kubeconfig = admin.kubeconfig(folder / "controllers.kubeconfig")
    scheduler, stages = folder / "scheduler.json", folder / "stages.yaml"
    client = {"kubeconfig": str(kubeconfig), "qps": 500, "burst": 1000}
    scheduler.write_text(
        json.dumps(
            {
                "apiVersion": "kubescheduler.config.k8s.io/v1",
                "kind": "KubeSchedulerConfiguration",
                "clientConnection": client,
                "leaderElection": {"leaderElect": False},
            }
        )
    )
    stages.write_text("\n---\n".join(json.dumps(stage) for stage in STAGES))
    commands: dict[str, list[str | Path]] = {
        "kube-controller-manager": [
            programs / "kube-controller-manager", f"--kubeconfig={kubeconfig}", "--leader-elect=false",
            "--secure-port=0", f"--service-account-private-key-file={folder / 'accounts.key'}", "--kube-api-qps=500",
            "--kube-api-burst=1000", "--concurrent-gc-syncs=20", "--node-monitor-grace-period=120s",
            f"--flex-volume-plugin-dir={folder / 'volume-plugins'}", f"--cert-dir={folder / 'certificates'}",
        ],
        "kube-scheduler": [programs / "kube-scheduler", f"--config={scheduler}", "--secure-port=0"],
        "kwok": [
            kwok, f"--kubeconfig={kubeconfig}", f"--config={stages}", "--node-port=0",
            "--node-lease-duration-seconds=40",  # without leases the controllers take the nodes for lost after a while
            f"--manage-nodes-with-annotation-selector={PLAYED}=fake",
        ],
    }  # fmt: skip
    with contextlib.ExitStack() as stack:
        for name, command in commands.items():
            log = stack.enter_context((folder / f"{name}.log").open("wb"))
            stack.enter_context(ended(subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, cwd=folder)))
        for each in range(number):
            admin.must("POST", "/api/v1/nodes", _node(f"node-{each}"))
        ends = time.monotonic() + READY_S
        while not _usable(admin, number):
            logs = "".join(f"{name}: {(folder / f'{name}.log').read_text()[-1500:]}\n" for name in commands)
            assert time.monotonic() < ends, logs
            time.sleep(0.5)
        yield


def _node(name: str) -> dict[str, Any]:
    room = {"cpu": "1k", "memory": "1Ti", "pods": str(PODS)}
    return {
        "metadata": {"name": name, "annotations": {PLAYED: "fake"}, "labels": {"kubernetes.io/hostname": name}},
        "spec": {"taints": [{"key": PLAYED, "value": "fake", "effect": "NoSchedule"}]},
        "status": {"allocatable": room, "capacity": room},
    }


def _usable(admin: Api, number: int) -> bool:
    """Whether pods may be made: all nodes are Ready, and the namespace has its account."""
    found = [
        condition["status"]
        for node in admin.must("GET", "/api/v1/nodes")["items"]
        if not any(taint["key"].startswith("node.kubernetes.io") for taint in node["spec"].get("taints") or ())
        for condition in node["status"].get("conditions") or ()
        if condition["type"] == "Ready"
    ]
    account = admin.get("/api/v1/namespaces/default/serviceaccounts/default")
    return found == ["True"] * number and account is not None
