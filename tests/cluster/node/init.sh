#!/usr/bin/env bash
# init.sh RUN PROGRAMS DNS: starts the node's programs inside of namespaces that are already made (see machine.py), and ends
# when one of them does: then everything in the namespaces ends. RUN is the folder of this node's settings and files.
set -euo pipefail
run=$1 programs=$2 dns=$3 pki=$1/pki
host=10.240.0.1
export HOME=$run/home KUBECACHEDIR=$run/home PATH=$programs:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin
mkdir -p "$HOME" "$run"/{lib,log,logs,volume-plugins,opt}
# What the programs write outside of their own folders stays in RUN.
mount --make-rprivate /
mount --make-rshared /
mount -t tmpfs -o mode=755 tmpfs /run
mount --bind "$run/lib" /var/lib
mount --bind "$run/log" /var/log
hostname node0
ip link set lo up
ip link add node0 type bridge
ip address add "$host/24" dev node0
ip link set node0 up
ip route add default dev node0
echo 1 >/proc/sys/net/ipv4/ip_forward
echo 1 >/proc/sys/net/bridge/bridge-nf-call-iptables

start() {
  local name=$1
  shift
  "$@" >"$run/logs/$name.log" 2>&1 &
}
until_ok() { # SECONDS COMMAND...: until the command succeeds
  local left=$(($1 * 10))
  shift
  until "$@" >/dev/null 2>&1; do
    left=$((left - 1))
    [ "$left" -gt 0 ] || { echo "node: '$*' does not succeed: see $run/logs" >&2; exit 1; }
    sleep 0.1
  done
}

start containerd containerd --config "$run/containerd.toml"
start etcd etcd --data-dir "$run/etcd" --unsafe-no-fsync --logger zap --log-level warn \
  --listen-client-urls http://127.0.0.1:2379 --advertise-client-urls http://127.0.0.1:2379 --listen-peer-urls http://127.0.0.1:2380
start apiserver kube-apiserver --etcd-servers http://127.0.0.1:2379 --advertise-address "$host" --secure-port 6443 \
  --service-cluster-ip-range 10.96.0.0/16 --authorization-mode Node,RBAC --enable-admission-plugins NodeRestriction \
  --allow-privileged --client-ca-file "$pki/ca.crt" --tls-cert-file "$pki/server.crt" --tls-private-key-file "$pki/server.key" \
  --kubelet-client-certificate "$pki/apiserver-to-kubelet.crt" --kubelet-client-key "$pki/apiserver-to-kubelet.key" \
  --kubelet-certificate-authority "$pki/ca.crt" --kubelet-preferred-address-types InternalIP \
  --service-account-issuer https://kubernetes.default.svc --service-account-key-file "$pki/accounts.pub" \
  --service-account-signing-key-file "$pki/accounts.key" --cert-dir "$run/api" --profiling=false
kubectl=(kubectl --kubeconfig "$pki/admin.kubeconfig")
until_ok 60 "${kubectl[@]}" get --raw /readyz
"${kubectl[@]}" apply --server-side --filename "$dns" >/dev/null # before CoreDNS starts, which else waits a minute
start controller-manager kube-controller-manager --kubeconfig "$pki/controller-manager.kubeconfig" --leader-elect=false \
  --root-ca-file "$pki/ca.crt" --service-account-private-key-file "$pki/accounts.key" --use-service-account-credentials \
  --kube-api-qps 200 --kube-api-burst 400 --flex-volume-plugin-dir "$run/volume-plugins" --bind-address 127.0.0.1 \
  --cert-dir "$run/controller-manager" --concurrent-gc-syncs 20
start scheduler kube-scheduler --kubeconfig "$pki/scheduler.kubeconfig" --leader-elect=false --bind-address 127.0.0.1 \
  --cert-dir "$run/scheduler"
start coredns coredns -conf "$run/Corefile"
until_ok 30 test -S /run/containerd/containerd.sock
start kubelet kubelet --config "$run/kubelet.yaml" --kubeconfig "$pki/kubelet.kubeconfig" --hostname-override node0 \
  --node-ip "$host" --root-dir "$run/lib/kubelet" --cert-dir "$run/lib/kubelet/pki"
start proxy kube-proxy --kubeconfig "$pki/proxy.kubeconfig" --proxy-mode iptables --cluster-cidr 10.244.0.0/24 \
  --hostname-override node0 --conntrack-max-per-core 0 --conntrack-min 0 --conntrack-tcp-timeout-established 0 \
  --conntrack-tcp-timeout-close-wait 0 --oom-score-adj 0
wait -n
echo "node: a program has ended: see $run/logs" >&2
