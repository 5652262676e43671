#!/usr/bin/env bash
# Scenarios as far as this machine and the time permit; says in one line what they do not. Nothing of it outlasts SECONDS
# by more than a minute, and the cluster is gone afterwards.
#   e2e/ci.sh SECONDS
set -euo pipefail
cd "$(dirname "$0")/.."
readonly WITHIN=$1
# A cluster that comes up and shows a thing or two takes so long.
readonly LEAST=300
# Free disk: Kubernetes with the caches of Go, and what a cluster writes.
readonly BUILT_GIB=10 RUN_GIB=4
readonly STATE=${FORESHARD_CLUSTER:-/tmp/foreshard-cluster}
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
# bounded SECONDS CMD...: what does not end is killed a moment later; 124 or 137 then
bounded() { timeout --kill-after=15 "$@"; }
# in_time CODE WHAT: whether a bounded command succeeded; WHAT was not done otherwise
in_time() {
  case $1 in
    0) ;;
    124 | 137) skip "$2 within the time; what is built stays for the next run" ;;
    *) fail "$2" ;;
  esac
}
enough() { [ "$(left)" -gt $LEAST ] || skip "$(left) s are left, a cluster takes $LEAST"; }
free_gib() { df --output=avail --block-size=1G "$1" | tail -1 | tr -d ' '; }

[ "$(id -u)" = 0 ] || skip "needs root"
unshare --net --mount sh -c 'mount -t tmpfs none /mnt' 2> /dev/null || skip "this machine lets nobody make namespaces and mounts"
[ -w /sys/fs/cgroup ] || skip "/sys/fs/cgroup cannot be written to"
if [ -f "$STATE/pids/apiserver" ] && [ -d "/proc/$(cat "$STATE/pids/apiserver")" ]; then
  skip "a cluster is up on this machine; e2e/cluster/cluster down takes it away"
fi
[ "$(free_gib /tmp)" -ge $RUN_GIB ] || skip "less than $RUN_GIB GiB are free in /tmp"
if ! e2e/cluster/build --check; then
  command -v go > /dev/null || skip "needs Go 1.26, to build Kubernetes"
  found=$(go env GOVERSION)
  [ "$(printf '%s\n' go1.26 "$found" | sort -V | head -1)" = go1.26 ] || skip "needs Go 1.26, to build Kubernetes; found $found"
  (cd / && bounded 60 go list -m golang.org/x/sys@latest) > /dev/null 2>&1 || skip "no Go module proxy answers"
  mkdir -p "$(go env GOCACHE)"
  for dir in . "$(go env GOCACHE)"; do
    [ "$(free_gib "$dir")" -ge $BUILT_GIB ] || skip "less than $BUILT_GIB GiB are free in $dir, to build Kubernetes"
  done
fi
enough

code=0
bounded 300 e2e/cluster/cluster packages || skip "packages of Debian are missing and cannot be installed"
enough
bounded $(($(left) - LEAST)) e2e/cluster/build || code=$?
in_time $code "Kubernetes was not built"
enough
bounded $(($(left) - LEAST)) e2e/cluster/cluster image || code=$?
in_time $code "the image was not built"
enough
if python3 -c 'import yaml' 2> /dev/null; then bounded 60 e2e/chart.py; else echo "e2e: the chart is not looked at: needs PyYAML"; fi
# run.py keeps to the time and takes the cluster down by itself; this is for the case that it cannot.
bounded $(($(left) + 30)) e2e/run.py --within="$(left)" || code=$?
[ $code -lt 124 ] || echo "e2e: scenarios went on after their time and were killed" >&2
[ ! -e "$STATE" ] || bounded 60 e2e/cluster/cluster down || fail "something is left of the cluster in $STATE"
exit $code
