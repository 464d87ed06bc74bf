"""What the operator costs, from ten TrainingRuns to a thousand: requests, memory, time until all of them run.

The operator is a process of its own, under a real API server with its etcd on this machine, which share its cores. The
heads are a server of ours that answers as the Ray Jobs API and the runs' status do; RayClusters get the status of a
cluster that is ready from a loop here, which stands in for KubeRay. There are no nodes and no pods.

Needs kube-apiserver and etcd: in the folder that STEADYHELM_TEST_PROGRAMS names, or where ``.ci/kubernetes`` has built
them.
"""

from __future__ import annotations

import contextlib
import os
import re
import resource
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from steadyhelm_operator.crd import crd
from steadyhelm_operator.testing import READY, FakeHeads
from steadyhelm_operator.testing.server import MERGE, Api, api_server, ended
from table import Row, main

RUNS = "/apis/steadyhelm.dev/v1alpha1/namespaces/default/trainingruns"
CLUSTERS = "/apis/ray.io/v1/namespaces/default/rayclusters"
DEFINITIONS = "/apis/apiextensions.k8s.io/v1/customresourcedefinitions"
HEADS = ("jobs", "status")
"""Resources of requests that go to heads, not to Kubernetes."""
DEADLINE_S = 900.0
OPEN = {"type": "object", "x-kubernetes-preserve-unknown-fields": True}
RAY_CLUSTERS = {
    "apiVersion": "apiextensions.k8s.io/v1",
    "kind": "CustomResourceDefinition",
    "metadata": {"name": "rayclusters.ray.io"},
    "spec": {
        "group": "ray.io",
        "scope": "Namespaced",
        "names": {"kind": "RayCluster", "plural": "rayclusters", "singular": "raycluster"},
        "versions": [
            {
                "name": "v1",
                "served": True,
                "storage": True,
                "subresources": {"status": {}},
                "schema": {"openAPIV3Schema": {"type": "object", "properties": {"spec": OPEN, "status": OPEN}}},
            }
        ],
    },
}
"""RayCluster without a schema: KubeRay's own would cost the API server, not the operator."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """What so many runs cost: until all of them run, and each minute from then on."""

    runs: int
    seconds: float
    requests: float
    steady_requests: float
    reconcile_p99_s: float
    memory_mib: float
    cpu_share: float


def programs() -> Path | None:
    """The folder with kube-apiserver and etcd; None where there is none."""
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "steadyhelm" / "kubernetes"
    named = os.environ.get("STEADYHELM_TEST_PROGRAMS")
    found = [Path(named)] if named else sorted(cache.glob("*"))
    whole = [folder for folder in found if all((folder / name).is_file() for name in ("etcd", "kube-apiserver"))]
    return whole[-1] if whole else None


def training_run(name: str) -> dict[str, Any]:
    """A run with a cluster of its own, of the size that they have."""
    group = {"rayStartParams": {}, "template": {"spec": {"containers": [{"name": "ray", "image": "ray"}]}}}
    return {
        "apiVersion": "steadyhelm.dev/v1alpha1",
        "kind": "TrainingRun",
        "metadata": {"name": name},
        "spec": {
            "run": {
                "name": "digits",
                "model": {"factory": "task.py:model"},
                "data": {"train": "task.py:pairs"},
                "schedule": {"iterations": 60},
            },
            "files": {"task.py": "x = 1\n" * 200},
            "cluster": {"template": {"spec": {"headGroupSpec": group, "authOptions": {"mode": "disabled"}}}},
        },
    }


def kuberay(admin: Api, stop: threading.Event) -> None:
    """What stands in for KubeRay: each RayCluster that is new gets the status of one that is ready."""
    done: set[str] = set()
    while not stop.wait(0.5):
        for body in admin.must("GET", CLUSTERS)["items"]:
            name = body["metadata"]["name"]
            if name not in done:
                admin.must("PATCH", f"{CLUSTERS}/{name}/status", {"status": READY}, MERGE)
                done.add(name)


@contextlib.contextmanager
def operator(kubeconfig: Path, url: str, port: int, log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """The operator's process."""
    command = [sys.executable, "-m", "steadyhelm_operator", f"--jobs-url={url}", f"--status-url={url}"]
    command += ["--health-port=0", f"--metrics-port={port}"]
    environment = {**os.environ, "KUBECONFIG": str(kubeconfig)}
    with log.open("wb") as output:
        process = subprocess.Popen(command, env=environment, stdout=output, stderr=subprocess.STDOUT)
    with ended(process):
        yield process


def metrics(port: int) -> list[tuple[str, dict[str, str], float]]:
    """The operator's metrics: name, labels, value."""
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
            text = answer.read().decode()
    except OSError:
        return []
    found = []
    for line in text.splitlines():
        match = re.fullmatch(r"(\w+)(?:\{(.*)\})? ([0-9.e+-]+)", line)
        if match:
            found.append((match[1], dict(re.findall(r'(\w+)="([^"]*)"', match[2] or "")), float(match[3])))
    return found


def requests(port: int) -> float:
    """Requests to the Kubernetes API so far, apart from the watches, which are kopf's."""
    wanted = "steadyhelm_operator_requests_total"
    return sum(n for name, labels, n in metrics(port) if name == wanted and labels["resource"] not in HEADS)


def running(port: int) -> float:
    """TrainingRuns that run."""
    return sum(n for name, labels, n in metrics(port) if name.endswith("_runs") and labels.get("phase") == "Running")


def p99(port: int) -> float:
    """The bound, of those that the histogram has, below which 99 of 100 looks took."""
    name = "steadyhelm_operator_reconcile_seconds_bucket"
    buckets = sorted(
        (float(labels["le"].replace("+Inf", "inf")), n) for found, labels, n in metrics(port) if found == name
    )
    return next((bound for bound, number in buckets if number >= 0.99 * buckets[-1][1]), float("inf"))


def memory_mib(pid: int) -> float:
    """Most memory that a process has had."""
    (peak,) = re.findall(r"VmHWM:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    return int(peak) / 1024


def cpu_s(pid: int) -> float:
    """CPU time of a process."""
    words = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(words[11]) + int(words[12])) / os.sysconf("SC_CLK_TCK")


def cost(folder: Path, number: int, settle_s: float, steady_s: float) -> Cost:
    """What ``number`` runs cost. Raises SystemExit where they do not all run in time."""
    found = programs()
    assert found is not None
    heads, stop = FakeHeads(iterations=1_000_000), threading.Event()
    with api_server(found, folder) as (admin, _), heads.served() as url:
        port = int(url.split(":")[2].split("/")[0]) + 1
        for definition in (RAY_CLUSTERS, crd()):
            admin.must("POST", DEFINITIONS, definition)
        while admin.call("GET", RUNS)[0] != 200 or admin.call("GET", CLUSTERS)[0] != 200:
            time.sleep(0.2)
        stand_in = threading.Thread(target=kuberay, args=(admin, stop), daemon=True)
        stand_in.start()
        with operator(admin.kubeconfig(folder / "kubeconfig"), url, port, folder / "operator.log") as process:
            began = time.monotonic()
            for each in range(number):
                admin.must("POST", RUNS, training_run(f"run-{each}"))
            while running(port) < number:
                if time.monotonic() - began > DEADLINE_S or process.poll() is not None:
                    print((folder / "operator.log").read_text()[-3000:], file=sys.stderr)
                    raise SystemExit(f"only {running(port):g} of {number} runs run")
                time.sleep(0.5)
            seconds, until = time.monotonic() - began, requests(port)
            time.sleep(settle_s)
            before, cpu, then = requests(port), cpu_s(process.pid), time.monotonic()
            for head in heads.heads.values():
                head.iteration += 1
            time.sleep(steady_s)
            minutes = (time.monotonic() - then) / 60
            found_cost = Cost(
                runs=number,
                seconds=seconds,
                requests=until / number,
                steady_requests=(requests(port) - before) / number / minutes,
                reconcile_p99_s=p99(port),
                memory_mib=memory_mib(process.pid),
                cpu_share=(cpu_s(process.pid) - cpu) / 60 / minutes,
            )
            stop.set()
            stand_in.join()
    return found_cost


def measure(quick: bool) -> Sequence[Row]:
    """The table. Raises SystemExit, with the reason, where there is no API server to measure under."""
    if programs() is None:
        print("not measured: neither STEADYHELM_TEST_PROGRAMS nor .ci/kubernetes has a kube-apiserver and an etcd")
        raise SystemExit(0)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, max(soft, 8192)), hard))
    costs = []
    for number in (5, 20) if quick else (10, 100, 1000):
        with tempfile.TemporaryDirectory() as folder:
            costs.append(cost(Path(folder), number, *((1.0, 10.0) if quick else (35.0, 60.0))))
    found = []
    for each in costs:
        name = f"{each.runs} runs"
        found += [
            Row(name=f"{name}: until all run", value=each.seconds, unit="s", goal=None, better="lower"),
            Row(name=f"{name}: requests each until it runs", value=each.requests, unit="", goal=None, better="lower"),
            Row(
                name=f"{name}: requests each, a minute", value=each.steady_requests, unit="", goal=None, better="lower"
            ),
            Row(name=f"{name}: look, 99th percentile", value=each.reconcile_p99_s, unit="s", goal=1.0, better="lower"),
            Row(name=f"{name}: memory", value=each.memory_mib, unit="MiB", goal=200.0, better="lower"),
            Row(name=f"{name}: cores, once all run", value=each.cpu_share, unit="", goal=None, better="lower"),
        ]
    few, many = costs[0], costs[-1]
    flat = many.requests / few.requests
    found.append(
        Row(name=f"requests each, {many.runs} runs / {few.runs}", value=flat, unit="ratio", goal=1.1, better="lower")
    )
    return found


if __name__ == "__main__":
    main("What the operator costs, by the number of runs that it looks after", measure)
