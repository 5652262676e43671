#!/usr/bin/env bash
# Scenarios as far as this machine and the time permit; says in one line what they do not.
#   e2e/ci.sh SECONDS
set -euo pipefail
cd "$(dirname "$0")/.."
readonly WITHIN=$1
# A cluster that comes up and shows a thing or two takes so long.
readonly LEAST=300
export PATH="$PATH:/usr/local/go/bin:/usr/sbin:/sbin"

skip() {
  echo "e2e: not run: $*"
  exit 0
}
fail() {
  echo "e2e: $*" >&2
  exit 1
}
left() { echo $((WITHIN - SECONDS)); }

[ "$(id -u)" = 0 ] || skip "needs root"
command -v go > /dev/null || [ -x .foreshard/cluster/bin/kubelet ] || skip "needs Go 1.26, to build Kubernetes"
unshare --net --mount sh -c 'mount -t tmpfs none /mnt' 2> /dev/null || skip "this machine lets nobody make namespaces and mounts"
[ -w /sys/fs/cgroup ] || skip "/sys/fs/cgroup cannot be written to"
[ "$(left)" -gt $LEAST ] || skip "$(left) s are left, a cluster takes $LEAST"

# What is built stays: the next run goes on from there.
code=0
timeout $(($(left) - LEAST)) e2e/cluster/build || code=$?
[ $code != 124 ] || skip "Kubernetes was not built within the time; what is built stays for the next run"
[ $code = 0 ] || fail "Kubernetes could not be built"
timeout "$(left)" e2e/cluster/cluster image || code=$?
[ $code != 124 ] || skip "the image was not built within the time"
[ $code = 0 ] || fail "the image could not be built"
[ "$(left)" -gt $LEAST ] || skip "$(left) s are left, a cluster takes $LEAST"
if python3 -c 'import yaml' 2> /dev/null; then e2e/chart.py; else echo "e2e: the chart is not looked at: needs PyYAML"; fi
e2e/run.py --within="$(left)"
