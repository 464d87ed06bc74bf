"""The cluster's chart as helm renders it, judged by the schemas of who reads it and by what has to hold anyway."""

import base64
import ipaddress
import json
import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, Phase, given, settings

from tests.charts.conftest import Render
from tests.charts.invariants import faults
from tests.charts.objects import CLUSTER, EXAMPLES, Manifest, groups, one, pods
from tests.charts.schemas import Judge
from tests.charts.test_cluster_values import SCHEMA, VALUES, merged
from tests.charts.values import values
from tests.cluster.stand_in.objects import head_pod as head_pod_of_kuberay
from tests.cluster.stand_in.objects import secret_name

pytestmark = pytest.mark.charts

EVERYTHING = {
    "s3": {"embedded": {"enabled": True, "size": "10Gi"}},
    "networkPolicy": {"apiFrom": ["research", "steadyhelm-system"], "metricsFrom": ["monitoring"]},
    "monitoring": {"podMonitor": {"enabled": True}, "alerts": {"enabled": True}},
    "kueue": {"queue": "research", "priorityClass": "high", "elastic": True},
    "pools": {
        "rollout": {
            "spot": {"enabled": True, "nodeSelector": {"spot": "true"}, "tolerations": [{"operator": "Exists"}]}
        }
    },
}
"""Values that turn everything on."""


def wrong(judge: Judge, manifests: list[Manifest]) -> list[str]:
    """Everything that schemas and invariants say against what was rendered."""
    templates = [spec["template"] for _, spec in groups(one(manifests, "RayCluster"))]
    return [
        *(fault for manifest in manifests for fault in judge.faults(manifest)),
        *(fault for template in templates for fault in judge.template_faults(template)),
        *faults(manifests),
    ]


def contradicts(given_values: dict[str, Any]) -> bool:
    """Whether values contradict each other in a way that a schema cannot see."""
    all_values = merged(VALUES, given_values)
    pools, s3, kueue = all_values["pools"], all_values["s3"], all_values["kueue"]
    scaled = (pools["rollout"], pools["rollout"]["spot"], pools["reward"])
    return (
        any(pool["min"] > pool["max"] for pool in scaled)
        or (s3["embedded"]["enabled"] and bool(s3["uri"] or s3["credentialsSecret"]))
        or (bool(kueue["queue"]) and all_values["autoscaling"]["enabled"] and not kueue["elastic"])
        or any(
            not bare(block)
            for egress in all_values["networkPolicy"]["egress"]
            for block in (egress["cidr"], *egress.get("except", ()))
        )
        or any(
            not smaller_part(part, egress["cidr"])
            for egress in all_values["networkPolicy"]["egress"]
            for part in egress.get("except", ())
        )
    )


def bare(block: str) -> bool:
    """Whether a block of addresses has no bits set behind its prefix."""
    try:
        ipaddress.ip_network(block)
    except ValueError:
        return False
    return True


def smaller_part(part: str, whole: str) -> bool:
    """Whether a block lies in another; of IPv6 the chart knows it of all addresses alone."""
    inner, outer = (ipaddress.ip_network(block, strict=False) for block in (part, whole))
    if inner.version != outer.version or inner.prefixlen <= outer.prefixlen:
        return False
    return whole == "::/0" if outer.version == 6 else inner.subnet_of(outer)


@pytest.mark.parametrize(
    ("part", "whole", "holds"),
    [
        ("10.1.0.0/16", "10.0.0.0/8", True),
        ("11.1.0.0/16", "10.0.0.0/8", False),
        ("10.18.0.0/16", "10.16.0.0/12", True),
        ("10.32.0.0/16", "10.16.0.0/12", False),
        ("10.0.0.0/8", "10.0.0.0/8", False),
        ("169.254.0.0/16", "0.0.0.0/0", True),
        ("fd00:ec2::254/128", "::/0", True),
        ("fd00:ec2::254/128", "fd00::/8", False),
        ("10.0.0.0/8", "::/0", False),
    ],
)
def test_an_exception_to_a_block_lies_in_it(render: Render, part: str, whole: str, holds: bool):
    chosen = {"networkPolicy": {"egress": [{"cidr": whole, "except": [part], "ports": [443]}]}}
    assert smaller_part(part, whole) == holds
    if holds:
        render(chosen)
    else:
        with pytest.raises(ValueError, match=f"{part} is no smaller part of {whole}"):
            render(chosen)


@pytest.mark.parametrize(
    "block",
    [
        "0.0.0.0/0", "10.0.0.0/8", "10.16.0.0/12", "10.0.0.1/32", "::/0", "fd00::/8", "fd00:ec2::254/128", "fe80::/10",
        "2001:db8:1:2:3:4:5:6/128", "2001:db8::8000/113", "10.0.0.1/8", "10.24.0.0/12", "0.0.0.1/0", "10.0.0.1/31",
        "fd00::1/8", "fe80::/6", "::1/127", "2001:db8:1:2:3:4:5:6/112", "2001:db8::c000/113",
    ],
)  # fmt: skip
def test_a_block_has_no_bits_behind_its_prefix(render: Render, block: str):
    def chosen(egress: dict[str, Any]) -> dict[str, Any]:
        return {"networkPolicy": {"egress": [{"ports": [443], **egress}]}}

    within = {"cidr": "::/0" if ":" in block else "0.0.0.0/0", "except": [block]}
    if bare(block):
        render(chosen({"cidr": block}))
        return
    for egress in ({"cidr": block}, within):
        with pytest.raises(ValueError, match=f"networkPolicy.egress: {block} has bits set behind its prefix"):
            render(chosen(egress))


@pytest.mark.parametrize(
    ("uri", "ports"),
    [
        ("s3://bucket/runs?endpoint=http://minio.minio.svc:9000&region=x", [9000]),
        ("s3://bucket/runs?region=x&endpoint=http://minio.minio.svc", [80]),
        ("s3://bucket/runs?endpoint=http://[fd00::1]:9000", [9000]),
        ("s3://bucket/runs?endpoint=https://[fd00::1]:443", [443]),
        ("s3://bucket/runs?endpoint=https://minio.minio.svc", [443]),
        ("s3://bucket/runs", []),
    ],
)
def test_the_store_can_be_reached_at_the_port_of_its_endpoint(render: Render, uri: str, ports: list[int]):
    rules = one(render({"s3": {"uri": uri}}), "NetworkPolicy", "rl")["spec"]["egress"]
    found = [rule for rule in rules if {"namespaceSelector": {}} in rule.get("to", [])]
    assert [rule["ports"][0]["port"] for rule in found] == ports
    assert all("::/0" in [peer.get("ipBlock", {}).get("cidr") for peer in rule["to"]] for rule in found)


def test_rayclusters_are_judged_by_kuberays_own_schema(judge: Judge, render: Render):
    if not judge.knows("RayCluster"):
        pytest.skip("KubeRay's CRDs are in no package: set STEADYHELM_KUBERAY_CRDS to a folder with them")
    cluster = one(render({}), "RayCluster")
    assert judge.faults(cluster) == []
    cluster["spec"]["workerGroupSpecs"][0]["template"]["spec"]["containers"][0]["imagePulPolicy"] = "Always"
    cluster["spec"]["authOptions"]["mode"] = "open"
    assert len(judge.faults(cluster)) == 2


@pytest.mark.parametrize(
    "chosen",
    [{}, EVERYTHING, *(yaml.safe_load(file.read_text()) for file in EXAMPLES)],
    ids=["defaults", "everything", *(file.stem for file in EXAMPLES)],
)
def test_defaults_and_examples_render_to_objects_that_hold(judge: Judge, render: Render, chosen: dict[str, Any]):
    assert wrong(judge, render(chosen)) == []


@pytest.mark.parametrize("file", [CLUSTER / "values.yaml", *EXAMPLES], ids=lambda file: file.stem)
def test_helm_finds_no_fault(helm: Path, file: Path):
    done = subprocess.run([helm, "lint", "--strict", CLUSTER, "--values", file], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@settings(max_examples=40, deadline=None, phases=(Phase.reuse, Phase.generate), suppress_health_check=list(HealthCheck))
@given(chosen=values(SCHEMA, VALUES))
def test_any_values_render_to_objects_that_hold(judge: Judge, render: Render, chosen: dict[str, Any]):
    if contradicts(chosen):
        with pytest.raises(ValueError, match="execution error"):
            render(chosen)
    else:
        assert wrong(judge, render(chosen)) == []


def head_pod(manifests: list[Manifest]) -> dict[str, Any]:
    return one(manifests, "RayCluster")["spec"]["headGroupSpec"]["template"]["spec"]


def first_group(manifests: list[Manifest]) -> dict[str, Any]:
    return one(manifests, "RayCluster")["spec"]["workerGroupSpecs"][0]


def leak(manifests: list[Manifest]) -> None:
    key = base64.b64decode(one(manifests, "Secret")["data"]["secret-key"]).decode()
    head_pod(manifests)["containers"][0]["env"].append({"name": "KEY", "value": key})


@pytest.mark.parametrize(
    ("spoil", "fault"),
    [
        (lambda m: head_pod(m).update(hostNetwork=True), "rl-headgroup has hostNetwork"),
        (lambda m: head_pod(m)["securityContext"].update(runAsNonRoot=False), "rl-headgroup may run as root"),
        (lambda m: head_pod(m)["containers"][0].pop("securityContext"), "rl-headgroup/ray-head: {}"),
        (lambda m: head_pod(m).update(automountServiceAccountToken=True), "rl-headgroup mounts a token"),
        (lambda m: head_pod(m)["volumes"].pop(0), "rl-headgroup/ray-head mounts what is no volume"),
        (
            lambda m: first_group(m)["template"]["spec"]["containers"][0]["resources"]["requests"].update(memory="9Ti"),
            "rl-rollout/ray-worker requests more memory than its limit",
        ),
        (lambda m: first_group(m).update(minReplicas=9), "group rollout: 9 ≤ 1 ≤ 4 does not hold"),
        (lambda m: first_group(m).update(resources={"CPU": "1", "pool_learner": "1"}), "group rollout of pool rollout"),
        (lambda m: first_group(m)["rayStartParams"].update({"num-cpus": "1"}), "group rollout: KubeRay refuses"),
        (lambda m: one(m, "Service")["spec"]["selector"].update(tier="x"), "Service rl-s3 selects nothing"),
        (
            lambda m: one(m, "NetworkPolicy", "rl-head")["spec"]["ingress"][0].pop("from"),
            "rl-head lets everything in",
        ),
        (
            lambda m: one(m, "NetworkPolicy", "rl-s3")["spec"]["ingress"][0]["ports"].append({"port": "ssh"}),
            "rl-s3 lets in {'port': 'ssh'}",
        ),
        (leak, "secret-key of Secret rl-s3 stands outside of it"),
    ],
)
def test_the_invariants_see_what_they_are_for(render: Render, spoil: Callable[[list[Manifest]], object], fault: str):
    manifests = render(EVERYTHING)
    assert faults(manifests) == []
    spoil(manifests)
    assert any(found.startswith(fault) for found in faults(manifests)), faults(manifests)


@pytest.mark.parametrize(
    ("chosen", "message"),
    [
        ({"pools": {"rollout": {"min": 5}}}, "pools.rollout.min is 5, but pools.rollout.max is 4: lower"),
        ({"pools": {"rollout": {"spot": {"min": 9}}}}, "pools.rollout.spot.min is 9, but pools.rollout.spot.max is 8"),
        ({"kueue": {"queue": "q"}}, "Kueue refuses clusters that scale themselves: turn autoscaling.enabled off"),
        (
            {"s3": {"uri": "s3://bucket/runs", "embedded": {"enabled": True}}},
            "leave s3.uri and s3.credentialsSecret empty",
        ),
        ({"pools": {"rollout": {"mim": 1}}}, "additional properties 'mim' not allowed"),
    ],
)
def test_a_contradiction_is_named_with_its_remedy(render: Render, chosen: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=re.escape(message)):
        render(chosen)


def test_a_release_whose_name_no_cluster_can_have_is_refused(render: Render):
    with pytest.raises(ValueError, match='name "7b" must begin with a letter'):
        render({}, release="7b")
    assert one(render({"name": "rl"}, release="7b"), "RayCluster")["metadata"]["name"] == "rl"


def test_kuberay_finds_what_belongs_to_a_cluster_with_the_longest_name(judge: Judge, render: Render):
    longest = "n" * 45
    manifests = render(EVERYTHING, release=longest)
    assert wrong(judge, manifests) == []
    cluster = one(manifests, "RayCluster")
    cluster["metadata"] |= {"namespace": "ns", "uid": "1"}
    assert one(manifests, "ServiceAccount", head_pod_of_kuberay(cluster)["spec"]["serviceAccountName"])
    (token,) = (volume for volume in one(manifests, "Pod")["spec"]["volumes"] if volume["name"] == "token")
    assert token["secret"]["secretName"] == secret_name(cluster)
    with pytest.raises(ValueError, match="have at most 45 lower-case letters"):
        render({}, release=longest + "n")


@pytest.mark.parametrize("release", ["null", "yes", "on", "n"])
def test_a_name_that_yaml_could_take_for_something_else_stays_a_name(judge: Judge, render: Render, release: str):
    manifests = render(EVERYTHING, release=release)
    assert one(manifests, "RayCluster")["metadata"]["name"] == release
    assert wrong(judge, manifests) == []


def test_everything_names_every_kind_and_admits_every_port_that_is_not_rays_own(render: Render):
    manifests = render(EVERYTHING)
    kinds = [manifest["kind"] for manifest in manifests]
    assert {kind: kinds.count(kind) for kind in kinds} == {
        "RayCluster": 1, "ServiceAccount": 2, "NetworkPolicy": 4, "PodDisruptionBudget": 2, "Secret": 1, "Service": 1,
        "StatefulSet": 1, "PodMonitor": 1, "PrometheusRule": 1, "ConfigMap": 2, "Pod": 1,
    }  # fmt: skip
    (head,) = (pod for pod in pods(manifests) if pod.group == "headgroup")
    admitted = {
        port["port"]
        for policy in ("rl", "rl-head")
        for rule in one(manifests, "NetworkPolicy", policy)["spec"]["ingress"]
        for port in rule.get("ports", [])
    }
    assert admitted == set(head.ports) - {"gcs-server"}
    (bucket,) = (pod for pod in pods(manifests) if pod.name == "rl-s3-0")
    assert bucket.spec["containers"][0]["args"] == [
        "--port",
        ":7070",
        "--quiet",
        "posix",
        "--concurrency",
        "1",
        "/data",
    ]


def test_only_named_namespaces_reach_the_ray_api(render: Render):
    def reaching(chosen: dict[str, Any]) -> list[str]:
        policy = one(render(chosen), "NetworkPolicy", "rl-head")
        return [
            peer["namespaceSelector"]["matchLabels"]["kubernetes.io/metadata.name"]
            for rule in policy["spec"].get("ingress", [])
            for peer in rule["from"]
            if {"port": "dashboard", "protocol": "TCP"} in rule["ports"]
        ]

    assert reaching({}) == []
    assert reaching({"networkPolicy": {"apiFrom": ["a", "b"], "metricsFrom": ["c"]}}) == ["a", "b"]


def test_only_the_autoscaler_holds_a_token_of_the_kubernetes_api(render: Render):
    manifests = render({})
    holders = {
        f"{pod.group}/{container['name']}"
        for pod in pods(manifests)
        for container in pod.containers
        if any(mount["name"] == "kubernetes-api" for mount in container["volumeMounts"])
    }
    assert holders == {"headgroup/autoscaler"}


def test_the_autoscaler_looks_as_often_as_the_values_say(render: Render):
    options = one(render({"autoscaling": {"lookSeconds": 7}}), "RayCluster")["spec"]["autoscalerOptions"]
    assert {"name": "AUTOSCALER_UPDATE_INTERVAL_S", "value": "7"} in options["env"]


def test_without_the_autoscaler_every_pool_has_its_least(render: Render):
    cluster = one(render({"autoscaling": {"enabled": False}, "pools": {"rollout": {"min": 3}}}), "RayCluster")["spec"]
    counts = {g["groupName"]: (g["minReplicas"], g["replicas"], g["maxReplicas"]) for g in cluster["workerGroupSpecs"]}
    assert counts == {"rollout": (3, 3, 3), "reference": (0, 0, 0), "reward": (1, 1, 1), "learner": (1, 1, 1)}
    assert "autoscalerOptions" not in cluster
    assert not any("priority" in group for group in cluster["workerGroupSpecs"])


def test_spot_pods_come_first_and_may_run_elsewhere_unless_they_must_not(render: Render):
    def rollouts(required: bool) -> list[dict[str, Any]]:
        spot = {
            "enabled": True,
            "nodeSelector": {"spot": "true"},
            "required": required,
            "tolerations": [{"operator": "Exists"}],
        }
        cluster = one(render({"pools": {"rollout": {"spot": spot}}}), "RayCluster")
        return [group for name, group in groups(cluster) if name.startswith("rollout")]

    stays, spot = rollouts(required=False)
    assert (stays["priority"], spot["priority"]) == (0, 10)
    assert "tolerations" not in stays["template"]["spec"]
    (preferred,) = spot["template"]["spec"]["affinity"]["nodeAffinity"].values()
    assert preferred == [
        {"weight": 100, "preference": {"matchExpressions": [{"key": "spot", "operator": "In", "values": ["true"]}]}}
    ]
    assert "nodeSelector" not in spot["template"]["spec"]
    assert rollouts(required=True)[1]["template"]["spec"]["nodeSelector"] == {"spot": "true"}


@pytest.mark.parametrize(
    ("rollout", "scaled", "least"),
    [
        ({"min": 0}, True, 4),
        ({"min": 1, "max": 8}, True, 8),
        ({"min": 1, "max": 8, "spot": {"enabled": True, "max": 32}}, True, 40),
        ({"min": 2, "max": 8, "spot": {"enabled": True, "min": 1}}, False, 3),
        ({"min": 0}, False, None),
        ({"min": 0, "max": 0}, True, None),
    ],
)
def test_evictions_leave_all_pods_of_a_pool_alone(
    render: Render, rollout: dict[str, Any], scaled: bool, least: int | None
):
    chosen = {"pools": {"rollout": {"protect": True, **rollout}}, "autoscaling": {"enabled": scaled}}
    budgets = {m["metadata"]["name"]: m["spec"] for m in render(chosen) if m["kind"] == "PodDisruptionBudget"}
    assert {name: budget["minAvailable"] for name, budget in budgets.items()} == {
        "rl-head": 1,
        "rl-learner": 1,
        **({"rl-rollout": least} if least else {}),
    }


def test_a_pools_values_go_over_the_defaults(render: Render):
    chosen = {
        "defaults": {"env": {"A": "1", "B": "1"}, "mounts": {"/data": {"claim": "all"}}, "nodeSelector": {"zone": "a"}},
        "pools": {
            "reward": {"env": {"B": "2", "HOME": "/data"}, "mounts": {"/data": {"secret": "own", "readOnly": True}}}
        },
        "image": {"registry": "registry.example.org/team/", "tag": "v2"},
    }
    chosen["image"]["registry"] = "registry.example.org/team"
    found = {pod.group: pod for pod in pods(render(chosen))}
    container = found["reward"].spec["containers"][0]
    environment = {env["name"]: env["value"] for env in container["env"]}
    assert {name: environment[name] for name in ("A", "B", "HOME")} == {"A": "1", "B": "2", "HOME": "/data"}
    assert found["reward"].spec["volumes"][-1] == {"name": "mount-0", "secret": {"secretName": "own"}}
    assert found["learner"].spec["volumes"][-1]["persistentVolumeClaim"] == {"claimName": "all"}
    assert {pod.spec["nodeSelector"]["zone"] for group, pod in found.items() if group} == {"a"}
    assert container["image"] == "registry.example.org/team/steadyhelm-reward:v2"


def test_every_pod_goes_where_the_values_send_it(render: Render):
    taint = {"key": "team", "operator": "Exists", "effect": "NoSchedule"}
    placed = {"nodeSelector": {"zone": "a"}, "tolerations": [taint], "priorityClassName": "high"}
    chosen = {
        "defaults": placed,
        "pools": {"head": {"priorityClassName": "higher"}, "learner": {"priorityClassName": "lower"}},
        "s3": {"embedded": {"enabled": True}},
    }
    found = {pod.name: pod.spec for pod in pods(render(chosen))}
    assert all((spec["nodeSelector"], spec["tolerations"]) == ({"zone": "a"}, [taint]) for spec in found.values())
    assert {name: spec["priorityClassName"] for name, spec in found.items()} == {
        **dict.fromkeys(("rl-headgroup", "rl-s3-0", "rl-smoke"), "higher"),
        **dict.fromkeys(("rl-rollout", "rl-reference", "rl-reward"), "high"),
        "rl-learner": "lower",
    }


@pytest.mark.parametrize(
    ("image", "reference"),
    [
        ("steadyhelm-cpu", "r.example.org:5000/steadyhelm-cpu:0.1.0"),
        ("steadyhelm-cpu:dev", "steadyhelm-cpu:dev"),
        ("localhost:5000/steadyhelm-cpu:dev", "localhost:5000/steadyhelm-cpu:dev"),
        (f"a/b@sha256:{'0' * 64}", f"a/b@sha256:{'0' * 64}"),
    ],
)
def test_an_image_is_completed_unless_it_is_whole(render: Render, image: str, reference: str):
    found = pods(render({"image": {"registry": "r.example.org:5000"}, "pools": {"head": {"image": image}}}))
    assert [pod.spec["containers"][0]["image"] for pod in found if pod.group == "headgroup"] == [reference]


def test_credentials_come_as_a_file(render: Render):
    manifests = render({"s3": {"uri": "s3://bucket/runs", "credentialsSecret": "mine"}})
    for pod in pods(manifests):
        if not pod.group:
            continue
        (volume,) = (volume for volume in pod.spec["volumes"] if volume["name"] == "s3-credentials")
        assert volume["secret"]["secretName"] == "mine"
        environment = {env["name"]: env["value"] for env in pod.spec["containers"][0]["env"]}
        assert environment["AWS_SHARED_CREDENTIALS_FILE"] == "/var/run/secrets/steadyhelm/s3/credentials"
        assert environment["STEADYHELM_STORE_URI"] == "s3://bucket/runs"


def test_the_smoke_test_runs_on_the_store_by_the_ray_api(render: Render):
    manifests = render({"s3": {"embedded": {"enabled": True}}})
    files = one(manifests, "ConfigMap", "rl-smoke")["data"]
    store = "s3://steadyhelm/runs?endpoint=http://rl-s3.ns.svc:7070"
    assert yaml.safe_load(files["smoke.yaml"])["store"]["uri"] == store
    assert files["smoke.py"] == (CLUSTER / "files" / "smoke" / "smoke.py").read_text()
    pod = one(manifests, "Pod")
    assert pod["metadata"]["annotations"]["helm.sh/hook"] == "test"
    assert "ray job submit --address http://rl-head-svc.ns.svc:8265" in pod["spec"]["containers"][0]["args"][0]
    assert not [m for m in render({}) if m["kind"] == "Pod"]


def test_the_dashboard_and_the_alerts_arrive_whole(render: Render):
    manifests = render(EVERYTHING)
    assert len(json.loads(one(manifests, "ConfigMap", "rl-dashboard")["data"]["steadyhelm.json"])["panels"]) > 10
    (group,) = one(manifests, "PrometheusRule")["spec"]["groups"]
    for rule in group["rules"]:
        assert '{namespace="ns",ray_io_cluster="rl"' in rule["expr"]
        assert rule["annotations"]["runbook_url"].startswith("docs/kubernetes.md#")
        assert "$labels.run" in rule["annotations"]["summary"]


def test_the_notes_say_what_is_next_and_what_is_missing(helm: Path, tmp_path: Path):
    def notes(*more: str) -> str:
        command = [helm, "install", "rl", CLUSTER, "--dry-run=client", "--namespace", "ns", *more]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout.partition("NOTES:")[2]

    bare, complete = notes(), notes("--values", str(CLUSTER / "examples" / "spot.yaml"))
    assert "steadyhelm submit RUN.yaml --release rl --namespace ns" in bare
    assert "MISSING  No store is named" in bare
    assert "helm -n ns test rl --timeout 960s" in complete
    assert 'uri: "s3://my-bucket/runs?region=eu-central-1"' in complete
    assert "MISSING  No" not in complete
    assert "MISSING  monitoring.alerts.runbook is no address" in complete
    trying = notes("--set", "s3.embedded.enabled=true,auth.mode=disabled,networkPolicy.enabled=false")
    assert trying.count("WARNING") == 3
