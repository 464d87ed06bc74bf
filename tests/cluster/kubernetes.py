"""A Kubernetes to test on: programs that talk to it, and waiting for what it does by itself."""

import os
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from tests.cluster.api import Api, ApiError, Manifest

T = TypeVar("T")
PERIOD_S = 0.5


@dataclass(frozen=True, slots=True, kw_only=True)
class Kubernetes:
    """One that answers."""

    api: Api
    kubeconfig: str
    inside: tuple[str, ...]
    """What a command is preceded by to reach it."""
    folder: Path
    """For files of the tests."""
    programs: dict[str, Path]
    """``kubectl`` and ``helm``."""
    init: int = 0
    """The process here that all of its node's descend from; 0 where the nodes are somebody else's."""

    @property
    def environment(self) -> dict[str, str]:
        """Of programs that talk to it; what they keep, they keep in ``folder``."""
        homes = {f"HELM_{name}_HOME": str(self.folder / "helm") for name in ("CACHE", "CONFIG", "DATA")}
        path = f"{self.programs['kubectl'].parent}{os.pathsep}{os.environ.get('PATH', '')}"
        own = {"PATH": path, "KUBECONFIG": self.kubeconfig, "KUBECACHEDIR": str(self.folder / "kube")}
        return {**os.environ, **own, **homes}

    def command(self, program: str | Path, *arguments: str | Path) -> list[str]:
        """The command that runs a program where it reaches the API server."""
        found = self.programs.get(str(program), program)
        return [str(word) for word in (*self.inside, found, *arguments)]

    def run(self, program: str | Path, *arguments: str | Path, timeout_s: float = 60.0, stdin: str = "") -> str:
        """What a program prints; it has to succeed."""
        done = subprocess.run(
            self.command(program, *arguments),
            env=self.environment,
            input=stdin,
            capture_output=True,
            text=True,
            timeout=timeout_s,
        )
        assert done.returncode == 0, f"{program} {' '.join(map(str, arguments))}:\n{done.stdout[-4000:]}{done.stderr}"
        return done.stdout

    def until(self, found: Callable[[], T | None], what: str, *, seconds: float, namespace: str = "") -> T:
        """Waits for what ``found`` finds. On time-out the failure tells how the namespace's pods are.

        An API server that gives no answer, or fails, does so in passing.
        """
        end = time.monotonic() + seconds
        while True:
            failed = ""
            try:
                result = found()
            except ApiError as error:
                if 0 < error.code < 500:
                    raise
                result, failed = None, f"{error}\n"
            if result:
                return result
            if time.monotonic() > end:
                told = self.told(namespace) if namespace else ""
                raise AssertionError(f"not within {seconds:g} s: {what}\n{failed}{told}")
            time.sleep(PERIOD_S)

    def pods(self, namespace: str, **labels: str) -> list[Manifest]:
        """A namespace's pods, by labels such as ``{"ray.io/group": "rollout"}``."""
        return self.api.items(f"/api/v1/namespaces/{namespace}/pods", **labels)

    def told(self, namespace: str) -> str:
        """How a namespace is: its pods, its latest events, and the ends of containers' logs."""
        lines = []
        for pod in self.pods(namespace):
            name, status = pod["metadata"]["name"], pod.get("status", {})
            states = status.get("initContainerStatuses", []) + status.get("containerStatuses", [])
            lines.append(f"pod {name}: {status.get('phase')} {status.get('message', '')}")
            for state in states:
                lines.append(f"  {state['name']}: {state['state']}, restarts {state['restartCount']}")
                if "waiting" not in state["state"] and not state["ready"]:
                    done = self._try("kubectl", "-n", namespace, "logs", name, "-c", state["name"], "--tail=15")
                    lines += [f"    {line}" for line in done.splitlines()]
        events = self._try("kubectl", "-n", namespace, "get", "events", "--sort-by=.lastTimestamp")
        return "\n".join([*lines, *events.splitlines()[-25:]])

    def left(self, namespace: str, *, apart: Sequence[str] = ()) -> list[str]:
        """Every object in a namespace, but those that Kubernetes puts there itself, and events of what was."""
        kinds = self.run("kubectl", "api-resources", "--namespaced", "--verbs=list", "-o", "name").split()
        kinds = [kind for kind in kinds if not kind.startswith("events") and "metrics.k8s.io" not in kind]
        found = self.run("kubectl", "-n", namespace, "get", ",".join(kinds), "-o", "name", "--ignore-not-found")
        own = {"configmap/kube-root-ca.crt", "serviceaccount/default", *apart}
        return sorted(set(found.split()) - own)

    def _try(self, *words: str) -> str:
        command = self.command(*words)
        done = subprocess.run(command, env=self.environment, capture_output=True, text=True, timeout=60)
        return done.stdout + done.stderr


def running(pod: Manifest) -> bool:
    """Whether a pod runs and is ready."""
    conditions: list[dict[str, Any]] = pod.get("status", {}).get("conditions", [])
    return "deletionTimestamp" not in pod["metadata"] and any(
        condition["type"] == "Ready" and condition["status"] == "True" for condition in conditions
    )
