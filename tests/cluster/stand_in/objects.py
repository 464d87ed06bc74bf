"""What a RayCluster becomes: pods, the head's service, the autoscaler's rights. Pure.

By the documented behaviour of KubeRay 1.7; held to objects that the real operator made (test_stand_in_objects.py).
"""

import json
from copy import deepcopy
from secrets import token_hex
from typing import Any

Manifest = dict[str, Any]

GCS, AGENT, METRICS = 6379, 52365, 8080
WAIT_FOR_HEAD = "until ray health-check --address {address} >/dev/null 2>&1; do sleep 2; done"


def labels(cluster: Manifest) -> dict[str, str]:
    """Labels of everything that belongs to a cluster."""
    return {
        "app.kubernetes.io/created-by": "kuberay-operator",
        "app.kubernetes.io/name": "kuberay",
        "ray.io/cluster": cluster["metadata"]["name"],
    }


def owned(cluster: Manifest, manifest: Manifest, **more: str) -> Manifest:
    """The object with the cluster's labels and as its child, so that it goes with the cluster."""
    metadata = manifest.setdefault("metadata", {})
    metadata["namespace"] = cluster["metadata"]["namespace"]
    metadata["labels"] = metadata.get("labels", {}) | labels(cluster) | more
    metadata["ownerReferences"] = [
        {
            "apiVersion": "ray.io/v1",
            "kind": "RayCluster",
            "name": cluster["metadata"]["name"],
            "uid": cluster["metadata"]["uid"],
            "controller": True,
            "blockOwnerDeletion": True,
        }
    ]
    return manifest


def scaled(cluster: Manifest) -> bool:
    """Whether Ray's autoscaler runs beside the head."""
    return bool(cluster["spec"].get("enableInTreeAutoscaling"))


def check_name(name: str) -> str:
    """A name as KubeRay cuts it: its last 50 characters, with ``r`` for a digit or dash at their start."""
    kept = name[-50:]
    return kept if kept[0].isalpha() else f"r{kept[1:]}"


def secret_name(cluster: Manifest) -> str:
    """Secret with the API's token; empty where the API is open."""
    options = cluster["spec"].get("authOptions", {})
    if options.get("mode") != "token":
        return ""
    return options.get("secretName") or check_name(cluster["metadata"]["name"])


def secret(cluster: Manifest) -> Manifest | None:
    """A token; None where the API is open or the user brings a Secret."""
    if not secret_name(cluster) or cluster["spec"]["authOptions"].get("secretName"):
        return None
    token = {"apiVersion": "v1", "kind": "Secret", "type": "Opaque", "stringData": {"auth_token": token_hex(32)}}
    return owned(cluster, token | {"metadata": {"name": secret_name(cluster)}})


def head_service(cluster: Manifest) -> Manifest:
    """The head's headless service: every named port of its first container."""
    name = cluster["metadata"]["name"]
    ports = {port["name"]: port["containerPort"] for port in head_pod(cluster)["spec"]["containers"][0]["ports"]}
    whose = {"ray.io/identifier": f"{name}-head", "ray.io/node-type": "head"}
    spec = {
        "clusterIP": "None",
        "publishNotReadyAddresses": True,
        "selector": labels(cluster) | whose,
        "type": "ClusterIP",
        "ports": [
            {"name": port, "port": number, "targetPort": number, "protocol": "TCP", "appProtocol": "tcp"}
            for port, number in sorted(ports.items())
        ],
    }
    service = {"apiVersion": "v1", "kind": "Service", "metadata": {"name": f"{name}-head-svc"}, "spec": spec}
    return owned(cluster, service, **whose)


def autoscaler_rights(cluster: Manifest) -> list[Manifest]:
    """ServiceAccount (where the head's template names none), Role and RoleBinding of the autoscaler."""
    if not scaled(cluster):
        return []
    name = check_name(cluster["metadata"]["name"])
    account = check_name(_head_account(cluster))
    rules = [
        {"apiGroups": [""], "resources": ["pods"], "verbs": ["get", "list", "watch", "patch"]},
        {"apiGroups": [""], "resources": ["pods/resize"], "verbs": ["patch"]},
        {"apiGroups": ["ray.io"], "resources": ["rayclusters"], "verbs": ["get", "patch"]},
    ]
    subject = {"kind": "ServiceAccount", "name": account, "namespace": cluster["metadata"]["namespace"]}
    group = "rbac.authorization.k8s.io"
    found: list[Manifest] = [
        {"apiVersion": f"{group}/v1", "kind": "Role", "rules": rules},
        {
            "apiVersion": f"{group}/v1",
            "kind": "RoleBinding",
            "roleRef": {"apiGroup": group, "kind": "Role", "name": name},
            "subjects": [subject],
        },
    ]
    if account == name:
        found.insert(0, {"apiVersion": "v1", "kind": "ServiceAccount"})
    return [owned(cluster, manifest | {"metadata": {"name": name}}) for manifest in found]


def head_pod(cluster: Manifest) -> Manifest:
    """The head's pod, with the autoscaler beside it where the cluster scales itself."""
    group = cluster["spec"]["headGroupSpec"]
    pod = _pod(cluster, group, "headgroup")
    main = pod["spec"]["containers"][0]
    asked = {"no-monitor": "true"} if scaled(cluster) else {}
    command = _start("--head", group, main, asked)
    if scaled(cluster):
        main["env"].append({"name": "RAY_enable_autoscaler_v2", "value": "true"})
        pod["spec"]["serviceAccountName"] = check_name(_head_account(cluster))
        sidecar = _autoscaler(cluster, main)
        pod["spec"]["containers"].append(sidecar)
        for container in (main, sidecar):
            _empty(pod, container, "ray-logs", "/tmp/ray")
    main["env"] += _token(cluster) + _identity(command) + [{"name": "RAY_ADDRESS", "value": f"127.0.0.1:{GCS}"}]
    return _run(pod, main, command)


def worker_pod(cluster: Manifest, group: Manifest, index: int) -> Manifest:
    """A pod of a worker group, which waits for the head before it starts."""
    name, namespace = cluster["metadata"]["name"], cluster["metadata"]["namespace"]
    host = f"{name}-head-svc.{namespace}.svc.cluster.local"
    address = f"{host}:{GCS}"
    pod = _pod(cluster, group, group["groupName"])
    pod["metadata"]["labels"]["ray.io/worker-group-replica-index"] = str(index)
    main = pod["spec"]["containers"][0]
    command = _start("", group, main, {"address": address})
    main["env"] += [*_token(cluster), {"name": "FQ_RAY_IP", "value": host}]
    main["env"].append({"name": "RAY_IP", "value": f"{name}-head-svc"})
    wait = {key: deepcopy(main[key]) for key in _WAITS_WITH if key in main} | {
        "name": "wait-gcs-ready",
        "command": ["/bin/bash", "-c", "--"],
        "args": [WAIT_FOR_HEAD.format(address=address)],
        "resources": {kind: {"cpu": "200m", "memory": "256Mi"} for kind in ("requests", "limits")},
    }
    pod["spec"].setdefault("initContainers", []).append(wait)
    main["env"] += [*_identity(command), {"name": "RAY_ADDRESS", "value": address}]
    return _run(pod, main, command)


_WAITS_WITH = ("image", "imagePullPolicy", "securityContext", "env", "envFrom", "volumeMounts")


def _head_account(cluster: Manifest) -> str:
    named: str | None = cluster["spec"]["headGroupSpec"]["template"]["spec"].get("serviceAccountName")
    return named or cluster["metadata"]["name"]


def _pod(cluster: Manifest, group: Manifest, group_name: str) -> Manifest:
    name, role = cluster["metadata"]["name"], "head" if group_name == "headgroup" else "worker"
    template = deepcopy(group["template"])
    metadata = template.get("metadata", {})
    metadata["labels"] = metadata.get("labels", {}) | group.get("labels", {})
    metadata["generateName"] = f"{name[:50]}-head-" if role == "head" else f"{name}-{group_name}"[:50] + "-worker-"
    pod = {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": template["spec"]}
    main = pod["spec"]["containers"][0]
    main.setdefault("env", [])
    ports = main.setdefault("ports", [])
    if all(port.get("name") != "metrics" for port in ports):
        ports.append({"name": "metrics", "containerPort": METRICS, "protocol": "TCP"})
    if scaled(cluster):
        pod["spec"]["restartPolicy"] = "Never"
    whose = {"group": group_name, "identifier": f"{name}-{role}", "is-ray-node": "yes", "node-type": role}
    return owned(cluster, pod, **{f"ray.io/{key}": value for key, value in whose.items()})


def _start(role: str, group: Manifest, main: Manifest, asked: dict[str, str]) -> str:
    """The command that starts Ray: what the group's fields say, over its ``rayStartParams``."""
    flags = dict(group.get("rayStartParams", {})) | asked
    flags |= {"block": "true", "dashboard-agent-listen-port": str(AGENT), "metrics-export-port": str(METRICS)}
    limits = main.get("resources", {}).get("limits", {})
    flags.setdefault("memory", str(_bytes(limits["memory"]))) if "memory" in limits else None
    if "nvidia.com/gpu" in limits:
        flags.setdefault("num-gpus", str(limits["nvidia.com/gpu"]))
    custom = {}
    for resource, amount in group.get("resources", {}).items():
        if resource in ("CPU", "GPU"):
            flags[f"num-{resource.lower()}s"] = str(amount)
        elif resource == "memory":
            flags["memory"] = str(_bytes(amount))
        else:
            custom[resource] = float(amount) if "." in str(amount) else int(amount)
    if custom:
        flags["resources"] = f"'{json.dumps(custom, separators=(',', ':'))}'"
    if group.get("labels"):
        flags["labels"] = ",".join(f"{key}={value}" for key, value in sorted(group["labels"].items()))
    words = [f"--{flag}" if value == "true" else f"--{flag}={value}" for flag, value in sorted(flags.items())]
    return " ".join(["ray start", *([role] if role else []), *words])


def _run(pod: Manifest, main: Manifest, command: str) -> Manifest:
    main["command"] = ["/bin/bash", "-c", "--"]
    main["args"] = [f"ulimit -n ${{RAY_START_ULIMIT_OPEN_FILES:-65536}}; {command}"]
    memory = main.get("resources", {}).get("limits", {}).get("memory")
    _empty(pod, main, "shared-mem", "/dev/shm", medium="Memory", **({"sizeLimit": memory} if memory else {}))
    patience = 5 if pod["metadata"]["labels"]["ray.io/node-type"] == "head" else 2
    probe = {"httpGet": {"path": "/api/healthz", "port": AGENT}, "periodSeconds": 5, "timeoutSeconds": patience}
    main.setdefault("livenessProbe", probe | {"initialDelaySeconds": 30, "failureThreshold": 120})
    main.setdefault("readinessProbe", probe | {"initialDelaySeconds": 10, "failureThreshold": 10})
    seen: dict[str, Manifest] = {}
    for variable in main["env"]:
        seen.setdefault(variable["name"], variable)  # what the template says counts
    main["env"] = list(seen.values())
    return pod


def _autoscaler(cluster: Manifest, main: Manifest) -> Manifest:
    """Ray's own autoscaler, which patches ``replicas`` and ``workersToDelete`` of the cluster's groups."""
    options = cluster["spec"].get("autoscalerOptions", {})
    command = "ray kuberay-autoscaler --cluster-name $(RAY_CLUSTER_NAME) --cluster-namespace $(RAY_CLUSTER_NAMESPACE)"
    usual = {"cpu": "500m", "memory": "512Mi"}
    return {
        "name": "autoscaler",
        "image": options.get("image") or main["image"],
        "imagePullPolicy": options.get("imagePullPolicy", "IfNotPresent"),
        "command": options.get("command") or ["/bin/bash", "-c", "--"],
        "args": options.get("args") or [command],
        "env": [
            _field("RAY_CLUSTER_NAME", "metadata.labels['ray.io/cluster']"),
            _field("RAY_CLUSTER_NAMESPACE", "metadata.namespace"),
            _field("RAY_HEAD_POD_NAME", "metadata.name"),
            {"name": "KUBERAY_CRD_VER", "value": "v1"},
            {"name": "KUBERAY_GEN_AUTOSCALER_START_CMD", "value": command},
            *_token(cluster),
            *options.get("env", []),
        ],
        "volumeMounts": deepcopy(options.get("volumeMounts", [])),
        "resources": options.get("resources", {"requests": usual, "limits": usual}),
        **({"securityContext": options["securityContext"]} if "securityContext" in options else {}),
    }


def _token(cluster: Manifest) -> list[Manifest]:
    name = secret_name(cluster)
    if not name:
        return []
    key = {"secretKeyRef": {"name": name, "key": "auth_token"}}
    return [{"name": "RAY_AUTH_MODE", "value": "token"}, {"name": "RAY_AUTH_TOKEN", "valueFrom": key}]


def _identity(command: str) -> list[Manifest]:
    """What a node is to Ray's autoscaler, by which it tells pods apart."""
    return [
        _field("RAY_CLUSTER_NAME", "metadata.labels['ray.io/cluster']"),
        _field("RAY_CLUSTER_NAMESPACE", "metadata.namespace"),
        _field("RAY_CLOUD_INSTANCE_ID", "metadata.name"),
        _field("RAY_NODE_TYPE_NAME", "metadata.labels['ray.io/group']"),
        {"name": "KUBERAY_GEN_RAY_START_CMD", "value": command},
        {"name": "RAY_PORT", "value": str(GCS)},
        {"name": "RAY_USAGE_STATS_KUBERAY_IN_USE", "value": "1"},
        {"name": "RAY_DASHBOARD_ENABLE_K8S_DISK_USAGE", "value": "1"},
    ]


def _field(name: str, path: str) -> Manifest:
    return {"name": name, "valueFrom": {"fieldRef": {"apiVersion": "v1", "fieldPath": path}}}


def _empty(pod: Manifest, container: Manifest, name: str, path: str, **how: str) -> None:
    """Mounts an empty folder at the path, unless something is mounted there."""
    mounts = container.setdefault("volumeMounts", [])
    if any(mount["mountPath"] == path for mount in mounts):
        return
    mounts.append({"name": name, "mountPath": path})
    volumes = pod["spec"].setdefault("volumes", [])
    if all(volume["name"] != name for volume in volumes):
        volumes.append({"name": name, "emptyDir": how})


def _bytes(quantity: str) -> int:
    """A quantity of memory, like ``512Mi``."""
    for power, unit in enumerate(("Ki", "Mi", "Gi", "Ti"), start=1):
        if str(quantity).endswith(unit):
            return int(float(quantity.removesuffix(unit)) * 1024**power)
    for power, unit in enumerate(("k", "M", "G", "T"), start=1):
        if str(quantity).endswith(unit):
            return int(float(quantity.removesuffix(unit)) * 1000**power)
    return int(quantity)
