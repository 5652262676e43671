"""What fails around a job: the operator, a worker, a node."""

import os
import signal

from kit import (
    STATE,
    SYSTEM,
    apply,
    holder,
    install,
    items,
    kubectl,
    local,
    log,
    losses,
    namespace,
    replaced,
    same,
    state,
    wait,
)
from scenarios import scenario


@scenario(70)
def operator_restart():
    """With the leading operator killed, training goes on; another takes over and repeats nothing."""
    namespace("restart")
    apply("restart", "chargpt")
    wait("3 steps", 150, lambda: len(log("restart", "chargpt")) >= 3)
    before = {p["metadata"]["name"]: p["metadata"]["uid"] for p in items("pods", "restart", "chargpt")}
    install("--set", "replicas=2")
    leader = holder()
    kubectl("delete", "pod", leader, "-n", SYSTEM, "--grace-period=0", "--force")
    wait("another operator leads", 30, lambda: holder() not in ("", leader))
    print(f"{leader} led, {holder()} leads")
    state("restart", "chargpt", "Complete", 200)
    after = {p["metadata"]["name"]: p["metadata"]["uid"] for p in items("pods", "restart", "chargpt")}
    assert before == after, "pods were made anew"
    found = [line["step"] for line in log("restart", "chargpt")]
    assert found == list(range(60)), "steps were lost or repeated"
    assert len(items("partitionplans", "restart")) == 1


@scenario(80)
def worker_killed():
    """A worker's pod is deleted mid-run: another takes its place, and the losses are those of a calm run."""
    namespace("killed")
    apply("killed", "chargpt")
    wait("25 steps", 200, lambda: len(log("killed", "chargpt")) >= 25)
    kubectl("delete", "pod", "chargpt-1", "-n", "killed", "--grace-period=0", "--force")
    job = state("killed", "chargpt", "Complete", 200)
    assert job["status"]["restarts"] >= 1
    worst = same(losses(log("killed", "chargpt")), local("chargpt", 60))
    print(f"restarts {job['status']['restarts']}, worst difference to a calm run in local mode {worst:.1e}")


def together(manifest):
    """Both shards on one node, if it has room."""
    return replaced(("  placement:\n    maxPerNode: 1\n", ""))(manifest)


@scenario(95)
def drained():
    """A node is drained mid-run: the job moves to the other one and goes on at the step where it stopped."""
    namespace("drained")
    apply("drained", "chargpt", together)
    wait("8 steps", 150, lambda: len(log("drained", "chargpt")) >= 8)
    before = {p["spec"]["nodeName"] for p in items("pods", "drained", "chargpt")}
    assert len(before) == 1, before
    node = before.pop()
    try:
        kubectl("drain", node, "--ignore-daemonsets", "--delete-emptydir-data", "--force", "--timeout=100s")
        state("drained", "chargpt", "Complete", 200)
    finally:
        kubectl("uncordon", node)
    plans = sorted(items("partitionplans", "drained"), key=lambda p: p["spec"]["revision"])
    assert [p["spec"]["nodes"] for p in plans][-1] != [node], plans
    print(f"revision {plans[-1]['spec']['revision']}: {plans[-1]['spec']['reason']}")
    same(losses(log("drained", "chargpt")), local("chargpt", 60))


@scenario(100)
def silent_node():
    """A node stops answering: the job goes on elsewhere from its last checkpoint."""
    namespace("silent")
    kubectl("cordon", "node-1")
    apply("silent", "chargpt", together)
    try:
        wait("25 steps", 200, lambda: len(log("silent", "chargpt")) >= 25)
    finally:
        kubectl("uncordon", "node-1")
    kubelet = int((STATE / "pids/kubelet-2").read_text())
    os.kill(kubelet, signal.SIGSTOP)
    try:
        wait("another plan", 60, lambda: len(items("partitionplans", "silent")) > 1)
        state("silent", "chargpt", "Complete", 200)
    finally:
        os.kill(kubelet, signal.SIGCONT)
    plan = max(items("partitionplans", "silent"), key=lambda p: p["spec"]["revision"])
    assert plan["spec"]["nodes"] == ["node-1"], plan["spec"]
    print(f"revision {plan['spec']['revision']}: {plan['spec']['reason']}")
    same(losses(log("silent", "chargpt")), local("chargpt", 60))
