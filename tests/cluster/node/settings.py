"""Settings of the node's programs, as files in the run's folder."""

import json
from pathlib import Path

from tests.cluster.node.addresses import API, HOST, PODS

PAUSE = "localhost/steadyhelm-pause:1"


def containerd(root: Path, scratch: Path) -> str:
    """containerd's, for this kind of machine: no capability to lower an OOM score, cgroups by files."""
    cri = 'plugins."io.containerd.grpc.v1.cri"'
    return f"""version = 2
root = "{root}"
state = "/run/containerd"
oom_score = 0
[grpc]
  address = "/run/containerd/containerd.sock"
[plugins."io.containerd.internal.v1.opt"]
  path = "{scratch}/opt"
[{cri}]
  sandbox_image = "{PAUSE}"
  restrict_oom_score_adj = true
  disable_apparmor = true
  [{cri}.containerd]
    snapshotter = "overlayfs"
    default_runtime_name = "runc"
    [{cri}.containerd.runtimes.runc]
      runtime_type = "io.containerd.runc.v2"
      [{cri}.containerd.runtimes.runc.options]
        SystemdCgroup = false
  [{cri}.cni]
    bin_dir = "/usr/lib/cni"
    conf_dir = "{scratch}/cni"
"""


def write(folder: Path) -> None:
    """Writes all settings into ``folder``, where certificates lie under ``pki``."""
    pki = folder / "pki"
    (folder / "containerd.toml").write_text(containerd(folder / "containerd", folder))
    (folder / "resolv.conf").write_text(f"nameserver {HOST}\n")
    network = {
        "cniVersion": "0.4.0",
        "name": "pods",
        "plugins": [
            {
                "type": "bridge",
                "bridge": "cni0",
                "isGateway": True,
                "ipMasq": True,
                "hairpinMode": True,
                "ipam": {
                    "type": "host-local",
                    "dataDir": "/run/cni-addresses",
                    "ranges": [[{"subnet": PODS}]],
                    "routes": [{"dst": "0.0.0.0/0"}],
                },
            },
            {"type": "portmap", "capabilities": {"portMappings": True}},
        ],
    }
    (folder / "cni").mkdir()
    (folder / "cni" / "10-pods.conflist").write_text(json.dumps(network))
    kubelet = {
        "apiVersion": "kubelet.config.k8s.io/v1beta1",
        "kind": "KubeletConfiguration",
        "authentication": {
            "anonymous": {"enabled": False},
            "webhook": {"enabled": True},
            "x509": {"clientCAFile": str(pki / "ca.crt")},
        },
        "tlsCertFile": str(pki / "kubelet.crt"),
        "tlsPrivateKeyFile": str(pki / "kubelet.key"),
        "clusterDomain": "cluster.local",
        "clusterDNS": [HOST],
        "resolvConf": str(folder / "resolv.conf"),
        "containerRuntimeEndpoint": "unix:///run/containerd/containerd.sock",
        "cgroupDriver": "cgroupfs",
        "cgroupsPerQOS": True,
        "failCgroupV1": False,
        "failSwapOn": False,
        "oomScoreAdj": 0,
        "maxOpenFiles": 20000,
        "imageMinimumGCAge": "24h",
        "imageGCHighThresholdPercent": 100,
        "imageGCLowThresholdPercent": 99,
        "evictionHard": {"nodefs.available": "500Mi", "memory.available": "200Mi"},
        "volumePluginDir": str(folder / "volume-plugins"),
        "nodeStatusUpdateFrequency": "5s",
        "syncFrequency": "20s",
    }
    (folder / "kubelet.yaml").write_text(json.dumps(kubelet, indent=1))
    # Two blocks: a catch-all in the cluster's own would answer before the cluster does.
    (folder / "Corefile").write_text(
        f"""cluster.local in-addr.arpa ip6.arpa {{
  bind {HOST}
  errors
  kubernetes cluster.local in-addr.arpa ip6.arpa {{
    endpoint {API}
    tls {pki}/coredns.crt {pki}/coredns.key {pki}/ca.crt
    ttl 2
  }}
}}
. {{
  bind {HOST}
  template ANY ANY . {{
    rcode NXDOMAIN
  }}
}}
"""
    )
