"""From and to Kubernetes' objects: pure functions that read what matters of them, and build the children of a run."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Mapping
from datetime import datetime
from pathlib import PurePosixPath
from typing import Any

from pydantic import ValidationError
from steadyhelm import jobs
from steadyhelm.config.load import code_references, validate
from steadyhelm.config.place import check_lasting, check_run_id
from steadyhelm.config.source import Source, dotted
from steadyhelm.errors import ConfigError

from steadyhelm_operator.api import API_VERSION, FINALIZER, KIND, PAYLOAD_BYTES, Cluster, Frame, Spec, parse_status
from steadyhelm_operator.state import (
    QUEUE_LABEL,
    TEMPLATE_ANNOTATION,
    ClusterView,
    Desired,
    Notice,
    Problem,
    Submit,
    instant,
)

Manifest = dict[str, Any]
RUN_FILE = "run.yaml"
"""Name of the run file in what is shipped to the cluster."""
STORE_VARIABLE = "STEADYHELM_STORE_URI"
"""Environment variable of the cluster's pods that names the store of runs."""
STORELESS = "the run has no store: set spec.run.store.uri, or s3.uri of the cluster's chart"
LONGEST_NAME = 255
"""Bytes of a file's name."""
LONGEST_CLUSTER = 45
"""Characters of a RayCluster's name: KubeRay cuts ``<name>-head`` to 50, and then finds no such account."""
EXIT_WRONG_INPUT = 2
"""Exit code of ``steadyhelm run`` where what was given is wrong."""


def desired(body: Mapping[str, Any]) -> Desired:
    """A TrainingRun as the API server holds it. A spec that describes no run is not an error here but said."""
    metadata = body["metadata"]
    spec, problem = _spec(body.get("spec") or {}, metadata["name"])
    return Desired(
        name=metadata["name"],
        namespace=metadata["namespace"],
        uid=metadata["uid"],
        generation=metadata.get("generation", 0),
        version=metadata.get("resourceVersion", ""),
        spec=spec,
        frame=spec or _frame(body.get("spec") or {}),
        problem=problem,
        status=parse_status(body.get("status")),
        held=FINALIZER in metadata.get("finalizers", ()),
        deleting_since=instant(metadata.get("deletionTimestamp") or ""),
        payload=_payload(body.get("spec") or {}),
    )


def _spec(raw: Mapping[str, Any], name: str) -> tuple[Spec | None, str]:
    """The spec, or what is wrong with it in the words of ``steadyhelm validate``; ``name`` is the TrainingRun's."""
    try:
        validate(Source(name="spec.run", value=raw.get("run") or {}, lines={}))
        found = Spec.model_validate_json(json.dumps(raw), strict=True)
        check_run_id(found.id or name)
        if found.cluster.template is not None and len(name) > LONGEST_CLUSTER:
            text = f"has the run's name, and KubeRay keeps no more than {LONGEST_CLUSTER} characters of it whole"
            raise ConfigError(f"spec.cluster.template: its cluster {text}: give the TrainingRun a shorter one")
        if _names_store(raw):
            check_lasting(found.run.store.uri)
        _check_files(found, raw)
    except ConfigError as error:
        return None, str(error)
    except ValidationError as error:
        return None, "; ".join(f"spec.{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
    return found, ""


def _check_files(spec: Spec, raw: Mapping[str, Any]) -> None:
    """Raises ConfigError where the files cannot be shipped, or where the run needs another one."""
    for file in spec.files:
        if file == RUN_FILE or not all(_is_name(part) for part in file.split("/")):
            raise ConfigError(
                f"spec.files: {file!r} is no name of a file beside {RUN_FILE}: write one like lib/task.py"
            )
        for folder in map(str, PurePosixPath(file).parents):
            if folder in (RUN_FILE, *spec.files):
                text = f"{folder!r} is a file, and {file!r} makes it a folder"
                raise ConfigError(f"spec.files: {text}: rename one of them")
    for place, reference in code_references(spec.run):
        file = reference.partition(":")[0].removeprefix("./")
        if not file.startswith("/") and file not in spec.files:
            where = f"spec.run.{dotted(place)} is {reference!r}"
            raise ConfigError(f"{where}: put {file!r} into spec.files, or name a file of the image by its whole path")
    size = sum(len(content) for content in shipped(raw).values())
    if size > PAYLOAD_BYTES:
        text = f"spec.run and spec.files have {size} bytes, at most {PAYLOAD_BYTES} can be shipped"
        raise ConfigError(f"{text}: use an image")


def _is_name(part: str) -> bool:
    """Whether a file or a folder can be called so wherever it is unpacked."""
    legal = part.isprintable() and not {"\\", ":"} & set(part)
    return legal and part not in ("", ".", "..") and len(part.encode()) <= LONGEST_NAME


def _frame(raw: Mapping[str, Any]) -> Frame | None:
    beside = {name: value for name, value in raw.items() if name not in ("run", "files")}
    try:
        return Frame.model_validate_json(json.dumps(beside), strict=True)
    except ValidationError:
        return None


def _names_store(raw: Mapping[str, Any]) -> bool:
    return "uri" in ((raw.get("run") or {}).get("store") or {})


def shipped(spec: Mapping[str, Any]) -> dict[str, bytes]:
    """The files that go to the cluster: the run file as written (JSON is YAML), and the code beside it."""
    run_file = json.dumps(spec.get("run") or {}, indent=1, ensure_ascii=False).encode()
    return {RUN_FILE: run_file} | {name: text.encode() for name, text in (spec.get("files") or {}).items()}


def _payload(spec: Mapping[str, Any]) -> str:
    found = {"run": spec.get("run"), "files": spec.get("files") or {}}
    return checksum(found)


def checksum(value: Any) -> str:
    """16 hexadecimal digits that change with the value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def run_id(run: Desired) -> str:
    """Id of the run in the store."""
    return (run.frame.id if run.frame else None) or run.name


def submission_id(run: Desired, attempt: int) -> str:
    """Id of an attempt's job: of this very resource, so that a later one of that name never takes it for its own."""
    return jobs.submission_id(f"{run_id(run)}.{run.uid.replace('-', '')[:8]}", attempt)


def submission(run: Desired, attempt: int, raw: Mapping[str, Any], *, take_over: bool, changed: bool) -> Submit:
    """The driver's job.

    Args:
        run: whose.
        attempt: which one, from 1.
        raw: the spec as written.
        take_over: whether the run is this TrainingRun's, so that a driver that is still at it has to go.
        changed: whether the run began under another spec.
    """
    line = jobs.entrypoint(RUN_FILE, run_id(run), take_over=take_over, accept_changes=changed)
    if not _names_store(raw):  # the default would be a folder that goes away with the job
        missing = f'echo "{STORELESS}" >&2; exit {EXIT_WRONG_INPUT}'
        line = f'[ "${STORE_VARIABLE}" ] || {{ {missing}; }}; {line} --set "store.uri=${STORE_VARIABLE}"'
    return Submit(
        submission_id=submission_id(run, attempt),
        entrypoint=line,
        files=shipped(raw),
        metadata={
            "run": run_id(run),
            "attempt": str(attempt),
            "trainingrun": f"{run.namespace}/{run.name}",
        },
    )


def cluster_name(run: Desired, given: Cluster) -> str:
    """Name of the RayCluster that the run runs on."""
    return given.name or run.name


def ray_cluster(run: Desired, given: Cluster) -> Manifest:
    """The run's own RayCluster. Raises ValueError where the spec names one of somebody else."""
    if given.template is None:
        raise ValueError(f"spec.cluster of {run.name} names a cluster and has no template")
    template = given.template
    owned = {"app.kubernetes.io/managed-by": "steadyhelm-operator", "steadyhelm.dev/trainingrun": run.name}
    return {
        "apiVersion": "ray.io/v1",
        "kind": "RayCluster",
        "metadata": {
            "name": run.name,
            "namespace": run.namespace,
            "labels": {**template.labels, **owned},
            "annotations": {**template.annotations, TEMPLATE_ANNOTATION: template_checksum(given)},
            "ownerReferences": [
                {
                    "apiVersion": API_VERSION,
                    "kind": KIND,
                    "name": run.name,
                    "uid": run.uid,
                    "controller": True,
                    "blockOwnerDeletion": True,
                }
            ],
        },
        "spec": template.spec,
    }


def template_checksum(given: Cluster) -> str:
    """Checksum of the template; empty where there is none."""
    return "" if given.template is None else checksum(given.template.model_dump(mode="json"))


def suspend_patch(cluster: ClusterView, *, suspend: bool) -> list[Manifest]:
    """A JSON patch of one field, which fails where the cluster is another one or has changed since it was read."""
    return [
        {"op": "test", "path": "/metadata/uid", "value": cluster.uid},
        {"op": "test", "path": "/metadata/resourceVersion", "value": cluster.version},
        {"op": "add", "path": "/spec/suspend", "value": suspend},
    ]


def cluster_view(body: Mapping[str, Any]) -> ClusterView:
    """What matters of a RayCluster as the API server holds it."""
    metadata, spec, status = body["metadata"], body.get("spec") or {}, body.get("status") or {}
    conditions = {found["type"]: found for found in status.get("conditions") or ()}
    state = status.get("state", "")
    labels, auth = metadata.get("labels") or {}, spec.get("authOptions") or {}
    name, namespace = metadata["name"], metadata["namespace"]
    owners = [owner for owner in metadata.get("ownerReferences") or () if owner.get("controller")]
    service = (status.get("head") or {}).get("serviceName") or f"{name}-head-svc"
    head = conditions.get("HeadPodReady")
    failure = conditions.get("ReplicaFailure", {})
    return ClusterView(
        name=name,
        namespace=namespace,
        uid=metadata["uid"],
        version=metadata.get("resourceVersion", ""),
        created=instant(metadata.get("creationTimestamp") or ""),
        owner=owners[0]["uid"] if owners and owners[0]["kind"] == KIND else "",
        deleting="deletionTimestamp" in metadata,
        suspend=bool(spec.get("suspend")),
        suspended=state == "suspended" or _holds(conditions, "RayClusterSuspended"),
        queue=labels.get(QUEUE_LABEL, ""),
        provisioned=state == "ready" or _holds(conditions, "RayClusterProvisioned"),
        head_ready=state == "ready" if head is None else head["status"] == "True",
        host=f"{service}.{namespace}.svc",
        secret=(auth.get("secretName") or jobs.token_secret(name)) if auth.get("mode") == "token" else "",
        template=(metadata.get("annotations") or {}).get(TEMPLATE_ANNOTATION, ""),
        message=failure.get("message", "") if failure.get("status") == "True" else status.get("reason", ""),
    )


def _holds(conditions: Mapping[str, Mapping[str, Any]], kind: str) -> bool:
    return conditions.get(kind, {}).get("status") == "True"


_WAITING = {
    "ErrImagePull": "ImagePull",
    "ImagePullBackOff": "ImagePull",
    "InvalidImageName": "ImagePull",
    "ErrImageNeverPull": "ImagePull",
    "CreateContainerConfigError": "PodConfig",
    "CreateContainerError": "PodConfig",
    "CrashLoopBackOff": "PodCrash",
    "RunContainerError": "PodCrash",
}
_REMEDY = {
    "NoCapacity": "the cluster's autoscaler may add nodes; else free some, or ask for less",
    "ImagePull": "check the image's name and its pull secret",
    "PodConfig": "check the Secrets and ConfigMaps that the pod names",
    "PodCrash": "look at the pod's log",
    "OutOfMemory": "raise the pool's memory",
    "DiskFull": "raise the pool's scratch space, or the node's disk",
}


def problems(pods: Iterable[Mapping[str, Any]]) -> tuple[Problem, ...]:
    """What keeps the pods of a cluster from running, each reason once, the most frequent first.

    Example: ``Problem(reason="NoCapacity", message="2 of 4 learner pods: 0/3 nodes are available …")``
    """
    pods = list(pods)
    found: Counter[tuple[str, str]] = Counter()
    details: dict[tuple[str, str], str] = {}
    pools = Counter(_pool(pod) for pod in pods)
    for pod in pods:
        reason, detail = _wrong(pod)
        if reason:
            found[reason, _pool(pod)] += 1
            details.setdefault((reason, _pool(pod)), detail)
    return tuple(
        Problem(
            reason=reason,
            message=f"{number} of {pools[pool]} {pool} pods: {details[reason, pool]} ({_REMEDY[reason]})",
        )
        for (reason, pool), number in found.most_common()
    )


def podless(cluster: ClusterView) -> Problem:
    """What is wrong with a cluster for which KubeRay makes no pods: it refuses specs in events of the cluster alone."""
    see = f"see `kubectl describe raycluster {cluster.name} -n {cluster.namespace}`, and KubeRay's log"
    return Problem(reason="NoPods", message=f"KubeRay has made no pods: {cluster.message or see}")


def _pool(pod: Mapping[str, Any]) -> str:
    labels = pod["metadata"].get("labels") or {}
    return str(labels.get("app.kubernetes.io/component") or labels.get("ray.io/group") or "Ray")


def _wrong(pod: Mapping[str, Any]) -> tuple[str, str]:
    """Reason and detail of what is wrong with a pod; two empty texts where nothing is."""
    status = pod.get("status") or {}
    if status.get("reason") == "Evicted":
        full = "ephemeral" in status.get("message", "") or "emptyDir" in status.get("message", "")
        return ("DiskFull" if full else "NoCapacity"), status.get("message", "evicted")
    for condition in status.get("conditions") or ():
        if condition["type"] == "PodScheduled" and condition["status"] == "False":
            return "NoCapacity", condition.get("message", "cannot be scheduled")
    containers = [*(status.get("initContainerStatuses") or ()), *(status.get("containerStatuses") or ())]
    for container in containers:
        waiting = (container.get("state") or {}).get("waiting") or {}
        ended = [(container.get(when) or {}).get("terminated") or {} for when in ("state", "lastState")]
        if any(end.get("reason") == "OOMKilled" for end in ended) and not container.get("ready"):
            return "OutOfMemory", f"{container['name']} was killed for want of memory"
        if waiting.get("reason") in _WAITING:
            detail = waiting.get("message") or f"{container['name']}: {waiting['reason']}"
            if _WAITING[waiting["reason"]] == "ImagePull":
                detail = f"image {container.get('image', '?')} cannot be pulled"
            return _WAITING[waiting["reason"]], detail
    return "", ""


def event(run: Desired, notice: Notice, when: datetime) -> Manifest:
    """An event about the TrainingRun."""
    time = when.strftime("%Y-%m-%dT%H:%M:%S.%fZ")
    return {
        "apiVersion": "events.k8s.io/v1",
        "kind": "Event",
        "metadata": {"generateName": f"{run.name}-", "namespace": run.namespace},
        "type": "Warning" if notice.warning else "Normal",
        "reason": notice.reason,
        "note": notice.message[:1000],
        "action": "Reconcile",
        "eventTime": time,
        "reportingController": "steadyhelm.dev/operator",
        "reportingInstance": "steadyhelm-operator",
        "regarding": {
            "apiVersion": API_VERSION,
            "kind": KIND,
            "name": run.name,
            "namespace": run.namespace,
            "uid": run.uid,
            "resourceVersion": run.version,
        },
    }


def merge_patch(old: Any, new: Any) -> Any:
    """The JSON merge patch that makes ``new`` of ``old``; an empty mapping where they agree."""
    patch: Manifest = {}
    for name in sorted(old.keys() | new.keys()):
        if name not in new:
            patch[name] = None
        elif name not in old or not (isinstance(old[name], dict) and isinstance(new[name], dict)):
            if old.get(name) != new[name]:
                patch[name] = new[name]
        elif inner := merge_patch(old[name], new[name]):
            patch[name] = inner
    return patch
