#!/bin/bash
# A real one-node Kubernetes in network, host-name and mount namespaces of its own. Run it as root.
#   kubernetes.sh build DIR       etcd, containerd and runc of Debian; the parts of Kubernetes as one program from Go modules
#   kubernetes.sh up DIR          start it
#   kubernetes.sh stop PART DIR   end kube-apiserver or kubelet
#   kubernetes.sh start PART DIR  start it again
#   kubernetes.sh down DIR        end all of it
# LOG_MAX_SIZE and LOG_MAX_FILES set the rotation of logs. With an empty NO_ADMISSION, pods get tokens of their accounts.
set -eu
VERSION=1.36.3

build() {
  [ "$(id -u)" = 0 ] || { echo "the tests with a real Kubernetes need root: they are skipped"; exit 0; }
  command -v containerd >/dev/null && command -v etcd >/dev/null && command -v busybox >/dev/null || {
    apt-get update -qq
    DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends \
      etcd-server containerd runc containernetworking-plugins busybox-static iproute2
  }
  [ -x "$D/kube" ] || {
    mkdir -p "$D/src"
    cd "$D/src"
    export GOFLAGS=-mod=mod CGO_ENABLED=0
    rm -f go.mod go.sum
    go mod init example.com/kube
    # the modules that Kubernetes keeps in its own tree are published as v0.x of the same release
    mod=$(go mod download -json k8s.io/kubernetes@v$VERSION | python3 -c 'import json, sys; print(json.load(sys.stdin)["GoMod"])')
    grep -oE 'k8s.io/[a-z0-9-]+ => ./staging' "$mod" | awk -v v="v0${VERSION#1}" '{print "-replace=" $1 "=" $1 "@" v}' | sort -u | xargs go mod edit
    go mod edit -require=k8s.io/kubernetes@v$VERSION
    cat > main.go <<'GO'
package main

import (
	"context"
	"os"

	"github.com/spf13/cobra"
	"k8s.io/component-base/cli"
	apiserver "k8s.io/kubernetes/cmd/kube-apiserver/app"
	controllers "k8s.io/kubernetes/cmd/kube-controller-manager/app"
	scheduler "k8s.io/kubernetes/cmd/kube-scheduler/app"
	kubelet "k8s.io/kubernetes/cmd/kubelet/app"
)

func main() {
	// one of them a process: each takes the signals when it is made
	make := map[string]func() *cobra.Command{
		"kube-apiserver": func() *cobra.Command { return apiserver.NewAPIServerCommand() },
		"kube-controller-manager": controllers.NewControllerManagerCommand,
		"kube-scheduler": func() *cobra.Command { return scheduler.NewSchedulerCommand() },
		"kubelet": func() *cobra.Command { return kubelet.NewKubeletCommand(context.Background()) },
	}
	c := make[os.Args[1]]()
	os.Args = os.Args[1:]
	os.Exit(cli.Run(c))
}
GO
    go mod tidy
    nice go build -trimpath -ldflags '-s -w' -o "$D/kube" .
  }
  images
}

# pause:1 and busybox:1, from Debian's busybox
images() {
  python3 - "$D" "$(command -v busybox)" <<'PY'
import hashlib, io, json, os, subprocess, sys, tarfile

directory, busybox = sys.argv[1:]
for name, command in (("pause", ["/bin/sleep", "2147483647"]), ("busybox", ["/bin/sh"])):
    layer = io.BytesIO()
    with tarfile.open(fileobj=layer, mode="w") as tar:
        for folder in ("bin", "tmp", "etc"):
            info = tarfile.TarInfo(folder)
            info.type, info.mode = tarfile.DIRTYPE, 0o777
            tar.addfile(info)
        tar.add(busybox, "bin/busybox")
        for applet in subprocess.run([busybox, "--list"], capture_output=True, text=True).stdout.split():
            if applet != "busybox":
                info = tarfile.TarInfo("bin/" + applet)
                info.type, info.linkname = tarfile.SYMTYPE, "busybox"
                tar.addfile(info)
    content = layer.getvalue()
    rootfs = {"type": "layers", "diff_ids": ["sha256:" + hashlib.sha256(content).hexdigest()]}
    image = {"architecture": "amd64", "os": "linux", "config": {"Cmd": command, "Env": ["PATH=/bin"]}, "rootfs": rootfs}
    config = json.dumps(image).encode()
    file = hashlib.sha256(config).hexdigest() + ".json"
    manifest = [{"Config": file, "RepoTags": [f"docker.io/library/{name}:1"], "Layers": ["layer.tar"]}]
    with tarfile.open(os.path.join(directory, name + ".tar"), "w") as tar:
        for member, data in ((file, config), ("layer.tar", content), ("manifest.json", json.dumps(manifest).encode())):
            info = tarfile.TarInfo(member)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
PY
}

configure() {
  rm -rf "$R"
  mkdir -p "$R"/{etcd,certs,kubelet,ctd,cni}
  openssl genrsa -out "$R/sa.key" 2048 2>/dev/null
  printf '%s,%s,%s,"system:masters"\n' admintoken admin admin agenttoken agent agent > "$R/tokens.csv"
  cat > "$R/kubeconfig" <<X
apiVersion: v1
kind: Config
clusters: [{name: c, cluster: {server: "https://127.0.0.1:6443", insecure-skip-tls-verify: true}}]
users: [{name: u, user: {token: admintoken}}]
contexts: [{name: c, context: {cluster: c, user: u}}]
current-context: c
X
  cat > "$R/kubelet.yaml" <<X
apiVersion: kubelet.config.k8s.io/v1beta1
kind: KubeletConfiguration
authentication: {anonymous: {enabled: true}, webhook: {enabled: false}}
authorization: {mode: AlwaysAllow}
containerRuntimeEndpoint: unix://$R/ctd.sock
cgroupDriver: cgroupfs
cgroupsPerQOS: false
enforceNodeAllocatable: []
failSwapOn: false
failCgroupV1: false
registerNode: true
maxPods: 250
podLogsDir: $R/podlogs
podCIDR: 10.244.0.0/24
localStorageCapacityIsolation: false
imageGCHighThresholdPercent: 100
evictionHard: {memory.available: "50Mi", nodefs.available: "1%", nodefs.inodesFree: "1%", imagefs.available: "1%"}
containerLogMaxSize: ${LOG_MAX_SIZE:-10Mi}
containerLogMaxFiles: ${LOG_MAX_FILES:-5}
containerLogMonitorInterval: ${LOG_MONITOR:-10s}
X
  cat > "$R/containerd.toml" <<X
version = 2
root = "$R/ctd/root"
state = "$R/ctd/state"
[grpc]
  address = "$R/ctd.sock"
[plugins."io.containerd.grpc.v1.cri"]
  sandbox_image = "docker.io/library/pause:1"
  restrict_oom_score_adj = true
  disable_apparmor = true
  [plugins."io.containerd.grpc.v1.cri".containerd]
    snapshotter = "native"
  [plugins."io.containerd.grpc.v1.cri".cni]
    bin_dir = "/usr/lib/cni"
    conf_dir = "$R/cni"
X
  cat > "$R/cni/10-ptp.conflist" <<X
{"cniVersion": "0.4.0", "name": "ptp", "plugins": [{"type": "ptp", "ipam": {"type": "host-local", "dataDir": "$R/ipam", "ranges": [[{"subnet": "10.244.0.0/24"}]], "routes": [{"dst": "0.0.0.0/0"}]}}]}
X
}

# Start one part in the present namespaces.
part() {
  cd "$R"
  local kubeconfig="--kubeconfig=$R/kubeconfig"
  local auth="--authentication-kubeconfig=$R/kubeconfig --authorization-kubeconfig=$R/kubeconfig --bind-address=127.0.0.1 --leader-elect=false"
  case $1 in
    etcd)
      set -- etcd etcd --data-dir "$R/etcd" --listen-client-urls http://127.0.0.1:2379 \
        --advertise-client-urls http://127.0.0.1:2379 --listen-peer-urls http://127.0.0.1:2380 ;;
    kube-apiserver)
      set -- "$1" "$D/kube" kube-apiserver --etcd-servers=http://127.0.0.1:2379 --bind-address=0.0.0.0 --secure-port=6443 \
        --advertise-address=192.0.2.10 --cert-dir="$R/certs" --service-account-issuer=https://kubernetes.default.svc \
        --service-account-key-file="$R/sa.key" --service-account-signing-key-file="$R/sa.key" \
        --service-cluster-ip-range=10.0.0.0/24 --authorization-mode=RBAC --token-auth-file="$R/tokens.csv" \
        --endpoint-reconciler-type=none --kubelet-preferred-address-types=InternalIP,Hostname \
        --disable-admission-plugins="${NO_ADMISSION-ServiceAccount}" ;;
    containerd) set -- containerd containerd -c "$R/containerd.toml" ;;
    kube-controller-manager)
      set -- "$1" "$D/kube" kube-controller-manager $kubeconfig $auth --service-account-private-key-file="$R/sa.key" \
        --root-ca-file="$R/certs/apiserver.crt" --use-service-account-credentials=false --controllers='*,-bootstrapsigner,-tokencleaner' \
        --kube-api-qps=200 --kube-api-burst=200 ;;
    kube-scheduler) set -- "$1" "$D/kube" kube-scheduler $kubeconfig $auth ;;
    kubelet)
      set -- "$1" "$D/kube" kubelet $kubeconfig --config="$R/kubelet.yaml" --root-dir="$R/kubelet" \
        --cert-dir="$R/kubelet/pki" --hostname-override=node1 --node-ip=192.0.2.10 ;;
  esac
  local name=$1
  shift
  setsid "$@" >> "$R/$name.log" 2>&1 < /dev/null &
  echo $! > "$R/$name.pid"
}

wait_ready() {
  for _ in $(seq 300); do
    curl -sk -H 'Authorization: Bearer admintoken' https://127.0.0.1:6443/readyz | grep -q '^ok' && return
    sleep 0.2
  done
  return 1
}

inside() {
  mount --make-rprivate /
  ip link set lo up
  ip addr add 192.0.2.10/32 dev lo
  hostname node1
  part etcd
  part kube-apiserver
  part containerd
  for _ in $(seq 100); do ctr -a "$R/ctd.sock" version >/dev/null 2>&1 && break; sleep 0.2; done
  for image in pause busybox; do ctr -a "$R/ctd.sock" -n k8s.io images import --snapshotter native "$D/$image.tar"; done
  wait_ready
  part kube-controller-manager
  part kube-scheduler
  part kubelet
  wait
}

up() {
  configure
  setsid nohup unshare -n -u -m bash "$0" inside "$D" > "$R/start.log" 2>&1 < /dev/null &
  echo $! > "$R/namespace"
  for _ in $(seq 240); do
    nsenter -t "$(cat "$R/namespace")" -n -u kubectl --kubeconfig="$R/kubeconfig" get nodes 2>/dev/null | grep -q ' Ready' && return
    sleep 0.5
  done
  tail -n 3 "$R"/*.log
  return 1
}

down() {
  for name in kubelet kube-scheduler kube-controller-manager kube-apiserver containerd etcd; do
    [ -f "$R/$name.pid" ] && kill "$(cat "$R/$name.pid")" 2>/dev/null
  done || true
  sleep 1
  # containers outlive containerd, and what runs in them outlives their shims
  for pid in $(ps -eo pid,args | awk -v r="$R/" 'index($0, r) && !/awk/ && !/kubernetes.sh/ {print $1}'); do
    kill -9 $(ps -o pid= --ppid "$pid") "$pid" 2>/dev/null || true
  done
  [ -f "$R/namespace" ] && kill "$(cat "$R/namespace")" 2>/dev/null || true
}

case $1 in
  stop | start)
    D=$(realpath -m "$3")
    R=$D/run
    if [ "$1" = stop ]; then
      kill -9 "$(cat "$R/$2.pid")"
    else
      nsenter -t "$(cat "$R/namespace")" -n -u -m bash "$0" part "$2" "$D"
    fi ;;
  part)
    D=$3 R=$3/run
    part "$2" ;;
  *)
    D=$(realpath -m "${2:?a folder}")
    R=$D/run
    mkdir -p "$D"
    "$1" ;;
esac
