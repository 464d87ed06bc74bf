"""What the operator costs, from ten TrainingRuns to a thousand: requests, memory, time until all run, and are gone.

The operator is a process of its own, with its service account, under a real API server, etcd, controllers and scheduler
on this machine, whose cores they share. KWOK plays the nodes. What is not real: KubeRay, for which a loop here makes
each RayCluster's three pods and says when they are ready, and the heads, for which a server here answers as the Ray
Jobs API and the runs' status do.

Needs the programs of Kubernetes (in the folder that STEADYHELM_TEST_PROGRAMS names, or where ``.ci/kubernetes`` has
built them) and KWOK (where ``.ci/kwok`` has).
"""

from __future__ import annotations

import contextlib
import os
import re
import resource
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from steadyhelm_operator.crd import crd
from steadyhelm_operator.testing import FakeHeads
from steadyhelm_operator.testing.kuberay import WORKERS, KubeRayStandIn
from steadyhelm_operator.testing.nodes import PODS, nodes
from steadyhelm_operator.testing.server import OPERATOR, Api, api_server, ended
from table import Row, main

PROGRAMS = ("etcd", "kube-apiserver", "kube-controller-manager", "kube-scheduler")
RUNS = "/apis/steadyhelm.dev/v1alpha1/namespaces/default/trainingruns"
CLUSTERS = "/apis/ray.io/v1/namespaces/default/rayclusters"
PLACE_OF_PODS = "/api/v1/namespaces/default/pods"
DEFINITIONS = "/apis/apiextensions.k8s.io/v1/customresourcedefinitions"
BINDINGS = "/apis/rbac.authorization.k8s.io/v1/clusterrolebindings"
HEADS = ("jobs", "packages", "status")
"""Resources of requests that go to heads, not to Kubernetes."""
KINDS = ("trainingruns", "rayclusters", "customresourcedefinitions")
"""What the operator watches; each is listed once, when it begins."""
DEADLINE_S = 120.0
"""For a few runs to run, and to be gone; each takes ``EACH_S`` more."""
EACH_S = 0.5
ITERATION_S = 5.0
"""Of the runs, once all of them run: figures change more often than they are written."""
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
RIGHTS = {
    "metadata": {"name": "operator"},
    "roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": "ClusterRole", "name": "cluster-admin"},
    "subjects": [{"apiGroup": "rbac.authorization.k8s.io", "kind": "User", "name": OPERATOR}],
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """What so many runs cost: until all of them run, each minute from then on, and until all of them are gone."""

    runs: int
    seconds: float
    requests: float
    cpu_ms: float
    operator_cores: float
    server_cores: float
    reconcile_p99_s: float
    reconcile_waits: float
    lists: float
    steady_requests: float
    steady_cores: float
    gone_s: float
    memory_mib: float


def programs() -> tuple[Path, Path]:
    """The folder with Kubernetes' programs, and KWOK. Raises SystemExit where they are not built, which takes long."""
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "steadyhelm"
    named = os.environ.get("STEADYHELM_TEST_PROGRAMS")
    folders = [Path(named)] if named else sorted((cache / "kubernetes").glob("*"))
    whole = [folder for folder in folders if all((folder / name).is_file() for name in PROGRAMS)]
    kwok = sorted((cache / "kwok").glob("*/kwok"))
    if not whole or not kwok:
        print("not measured: there is no Kubernetes, or no KWOK. Run .ci/kubernetes and .ci/kwok, which build them.")
        raise SystemExit(0)
    return whole[-1], kwok[-1]


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


def until(holds: Callable[[], bool], what: str, seconds: float, told: Callable[[], object] = str) -> None:
    """Waits. Raises SystemExit past the deadline, with what ``told`` tells."""
    ends = time.monotonic() + seconds
    while not holds():
        if time.monotonic() > ends:
            raise SystemExit(f"not within {seconds:g} s: {what} {told()}")
        time.sleep(0.25)


class Operator:
    """The operator's process, and what it says about itself."""

    def __init__(self, process: subprocess.Popen[bytes], port: int) -> None:
        self.process, self._port = process, port

    def metrics(self) -> list[tuple[str, dict[str, str], float]]:
        """Name, labels, value of each; nothing where it does not answer."""
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self._port}/metrics", timeout=10) as answer:
                text = answer.read().decode()
        except OSError:
            return []
        found = []
        for line in text.splitlines():
            match = re.fullmatch(r"(\w+)(?:\{(.*)\})? ([0-9.e+-]+)", line)
            if match:
                found.append((match[1], dict(re.findall(r'(\w+)="([^"]*)"', match[2] or "")), float(match[3])))
        return found

    def requests(self) -> float:
        """Requests to the Kubernetes API so far, apart from the watches, which are kopf's."""
        wanted = "steadyhelm_operator_requests_total"
        return sum(n for name, labels, n in self.metrics() if name == wanted and labels["resource"] not in HEADS)

    def runs(self, phase: str = "") -> float:
        """TrainingRuns that it knows, or those of them in a phase. Raises SystemExit where the operator has ended."""
        if self.process.poll() is not None:
            raise SystemExit(f"the operator ended with {self.process.returncode}")
        found = [(its["phase"], n) for name, its, n in self.metrics() if name == "steadyhelm_operator_runs"]
        return sum(n for its, n in found if phase in ("", its))

    def p99_s(self) -> float:
        """The bound, of those that the histogram has, below which 99 of 100 looks took."""
        wanted = "steadyhelm_operator_reconcile_seconds_bucket"
        found = [
            (float(labels["le"].replace("+Inf", "inf")), n) for name, labels, n in self.metrics() if name == wanted
        ]
        return next((bound for bound, number in sorted(found) if number >= 0.99 * found[-1][1]), float("inf"))

    def waits(self) -> float:
        """Share of its looks' time in which it waited for an answer, of Kubernetes or of heads."""
        found: dict[str, float] = defaultdict(float)
        for name, _, value in self.metrics():
            found[name] += value
        spent = found["steadyhelm_operator_reconcile_seconds_sum"]
        return found["steadyhelm_operator_request_seconds_sum"] / spent if spent else 0.0

    def memory_mib(self) -> float:
        """Most memory that the process has had."""
        (peak,) = re.findall(r"VmHWM:\s+(\d+) kB", Path(f"/proc/{self.process.pid}/status").read_text())
        return int(peak) / 1024


@contextlib.contextmanager
def operator(kubeconfig: Path, url: str, folder: Path) -> Iterator[Operator]:
    """The operator, once it answers."""
    port = int(url.split(":")[2].split("/")[0]) + 1
    command = [sys.executable, "-m", "steadyhelm_operator", f"--jobs-url={url}", f"--status-url={url}"]
    command += ["--health-port=0", f"--metrics-port={port}"]
    with (folder / "operator.log").open("wb") as log:
        environment = {**os.environ, "KUBECONFIG": str(kubeconfig)}
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT)
    with ended(process):
        found = Operator(process, port)
        until(lambda: bool(found.metrics()), "the operator answers", 60.0)
        yield found


def cpu_s() -> dict[str, float]:
    """CPU seconds of this process's children so far, by the names of their programs."""
    found = {}
    for pid in Path("/proc/self/task").glob("*/children"):
        for child in pid.read_text().split():
            words = Path(f"/proc/{child}/stat").read_text().rpartition(")")[2].split()
            name = Path(f"/proc/{child}/comm").read_text().strip()
            found[name] = (int(words[11]) + int(words[12])) / os.sysconf("SC_CLK_TCK")
    return found


def lists(admin: Api) -> float:
    """Lists of what the operator watches that anybody read from the API server so far."""
    _, text = admin.call("GET", "/metrics")
    kinds = "|".join(KINDS)
    pattern = rf'^apiserver_request_total\{{[^}}]*resource="(?:{kinds})"[^}}]*verb="LIST"[^}}]*\}} (\S+)$'
    return sum(float(found) for found in re.findall(pattern, text, re.MULTILINE))


def each_of(number: int, admin: Api, verb: str) -> None:
    """Makes or deletes so many TrainingRuns, as fast as the API server takes it from eight people."""
    with ThreadPoolExecutor(max_workers=8) as people:
        names = [f"run-{each}" for each in range(number)]
        if verb == "POST":
            done = [people.submit(admin.must, verb, RUNS, training_run(name)) for name in names]
        else:
            done = [people.submit(admin.must, verb, f"{RUNS}/{name}") for name in names]
        for each in done:
            each.result()


def cost(folder: Path, number: int, settle_s: float, steady_s: float) -> Cost:
    """What ``number`` runs cost. Raises SystemExit where they do not all run in time."""
    kubernetes, kwok = programs()
    heads = FakeHeads(iterations=1_000_000)
    with contextlib.ExitStack() as stack:
        admin, account = stack.enter_context(api_server(kubernetes, folder))
        url = stack.enter_context(heads.served())
        for definition in (RAY_CLUSTERS, crd()):
            admin.must("POST", DEFINITIONS, definition)
        admin.must("POST", BINDINGS, RIGHTS)
        until(
            lambda: all(admin.call("GET", place)[0] == 200 for place in (RUNS, CLUSTERS)), "both kinds are served", 60
        )
        stack.enter_context(nodes(kubernetes, kwok, admin, folder, -(-number * (WORKERS + 1) // PODS)))
        kuberay = KubeRayStandIn(admin)
        stack.enter_context(kuberay.at_work())
        read = lists(admin)
        its = stack.enter_context(operator(account.kubeconfig(folder / "kubeconfig"), url, folder))
        until(lambda: lists(admin) - read >= len(KINDS), "the operator watches", 60)
        before, cpu, began = its.requests(), cpu_s(), time.monotonic()
        each_of(number, admin, "POST")
        deadline = DEADLINE_S + EACH_S * number
        until(lambda: its.runs("Running") == number, "all runs run", deadline, lambda: kuberay.faults[:3])
        seconds, used = time.monotonic() - began, cpu_s()
        spent = {name: used[name] - cpu[name] for name in cpu}
        running = its.requests() - before
        slow, waits = its.p99_s(), its.waits()
        heads.pace_s = ITERATION_S
        time.sleep(settle_s)
        before, cpu, then = its.requests(), cpu_s(), time.monotonic()
        time.sleep(steady_s)
        minutes, used = (time.monotonic() - then) / 60, cpu_s()
        steady, read = its.requests() - before, lists(admin) - read
        then = time.monotonic()
        each_of(number, admin, "DELETE")
        until(lambda: not any(map(admin.first, (RUNS, CLUSTERS, PLACE_OF_PODS))), "nothing is left", deadline)
        return Cost(
            runs=number,
            seconds=seconds,
            requests=running / number,
            cpu_ms=1000 * spent["python"] / number,
            operator_cores=spent["python"] / seconds,
            server_cores=(spent["kube-apiserver"] + spent["etcd"]) / seconds,
            reconcile_p99_s=slow,
            reconcile_waits=waits,
            lists=read,
            steady_requests=steady / number / minutes,
            steady_cores=(used["python"] - cpu["python"]) / 60 / minutes,
            gone_s=time.monotonic() - then,
            memory_mib=its.memory_mib(),
        )


def rows(found: Cost) -> list[Row]:
    """What there is to say about one number of runs."""

    def row(
        name: str, value: float, unit: str, goal: float | None = None, better: Literal["higher", "lower"] = "lower"
    ) -> Row:
        return Row(name=f"{found.runs} runs: {name}", value=value, unit=unit, goal=goal, better=better)

    return [
        row("until all run", found.seconds, "s"),
        row("requests each until it runs", found.requests, ""),
        row("the operator's CPU each until it runs", found.cpu_ms, "ms"),
        row("cores of the operator meanwhile", found.operator_cores, ""),
        row("cores of API server and etcd meanwhile", found.server_cores, "", None, "higher"),
        row("look, 99th percentile", found.reconcile_p99_s, "s", 1.0),
        row("share of a look that waits for answers", found.reconcile_waits, ""),
        row("lists of whole kinds, from the start", found.lists, "", float(len(KINDS))),
        row("requests each, a minute, once all run", found.steady_requests, ""),
        row("cores of the operator, once all run", found.steady_cores, ""),
        row("until all are gone", found.gone_s, "s"),
        row("memory of the operator", found.memory_mib, "MiB", 200.0),
    ]


def measure(quick: bool) -> Sequence[Row]:
    """The table. Raises SystemExit, with the reason, where there is no Kubernetes to measure under."""
    programs()
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, max(soft, 8192)), hard))
    costs = []
    for number in (4, 12) if quick else (10, 100, 1000):
        with tempfile.TemporaryDirectory() as folder:
            costs.append(cost(Path(folder), number, *((1.0, 5.0) if quick else (30.0, 45.0))))
    few, many = costs[0], costs[-1]
    flat = f"{many.runs} runs / {few.runs}"
    return [
        *(row for each in costs for row in rows(each)),
        Row(name=f"requests each, {flat}", value=many.requests / few.requests, unit="ratio", goal=1.1, better="lower"),
        Row(name=f"CPU each, {flat}", value=many.cpu_ms / few.cpu_ms, unit="ratio", goal=1.1, better="lower"),
    ]


if __name__ == "__main__":
    main("What the operator costs, by the number of runs that it looks after", measure)
