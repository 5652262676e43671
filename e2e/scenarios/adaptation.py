"""What slows a job down: the plan follows."""

import contextlib
import re
import subprocess
import time
from pathlib import Path

from kit import (
    apply,
    condition,
    cpu,
    get,
    kubectl,
    local,
    log,
    losses,
    namespace,
    plans,
    replaced,
    same,
    steps,
    uids,
    wait,
)
from scenarios import scenario


ADAPTATION = """  adaptation:
    # Far shorter than in earnest: a test is over in minutes.
    horizon: 120
    dwell: 2
    cooldown: 5
    mode: MODE
"""


def adaptive(mode="Auto"):
    """A job that is long enough to be recut, and checkpoints seldom."""

    def change(manifest):
        # Dropout draws anew for each microbatch: of one size, they have the same losses under every plan.
        same_losses = ("    shards: 2\n", "    shards: 2\n    microbatch: 4\n")
        manifest = replaced(("everySteps: 20", "everySteps: 1000"), same_losses)(steps(3000)(manifest))
        return manifest + ADAPTATION.replace("MODE", mode)

    return change


@contextlib.contextmanager
def slow_worker(namespace, pod, share):
    """The worker in a pod gets only so much of what it takes now, as it would beside others on its node."""
    statuses = get("pod", pod, namespace)["status"]["containerStatuses"]
    container = statuses[0]["containerID"].removeprefix("containerd://")
    cgroups = Path("/sys/fs/cgroup")
    # The second version of cgroups has both in one file, the first one each in its own.
    if (cgroups / "cgroup.controllers").exists():
        [quota] = cgroups.rglob(f"*{container}*/cpu.max")
        period = quota.read_text().split()[1]
    else:
        [quota] = (cgroups / "cpu").rglob(f"{container}/cpu.cfs_quota_us")
        period = (quota.parent / "cpu.cfs_period_us").read_text()
    before = quota.read_text()

    def computed():
        return sum(cpu(pid) for pid in (quota.parent / "cgroup.procs").read_text().split())

    # Where others compute on this machine, it takes less than a core already.
    start, seconds = computed(), 5
    time.sleep(seconds)
    takes = (computed() - start) / seconds
    print(f"{pod} takes {takes:.2f} of a core and gets {share * takes:.2f}")
    quota.write_text(str(int(share * takes * int(period))))
    try:
        yield
    finally:
        if quota.exists():
            quota.write_text(before)


@contextlib.contextmanager
def slow_network(rate):
    """Both nodes send no faster than so."""
    nodes = ("n1", "n2")
    tbf = ["root", "tbf", "rate", rate, "burst", "64kb", "latency", "200ms"]
    for node in nodes:
        subprocess.run(["nsenter", f"--net=/run/netns/{node}", "tc", "qdisc", "add", "dev", "eth0", *tbf], check=True)
    try:
        yield
    finally:
        for node in nodes:
            subprocess.run(["nsenter", f"--net=/run/netns/{node}", "tc", "qdisc", "del", "dev", "eth0", "root"], check=True)


def recut(namespace, before, seconds=300):
    """Waits for a recut in the pods that are there, and for steps under it; every step is taken once, with the same loss."""
    found = wait("a recut", seconds, lambda: len(plans(namespace)) > 1 and plans(namespace))
    assert found[1]["spec"]["shards"] == found[0]["spec"]["shards"], "other seats"
    print(f"revision 2: {found[1]['spec']['reason']}: {', '.join(found[1]['spec']['changes'])}")
    assert any("ops instead of" in change for change in found[1]["spec"]["changes"])
    done = len(log(namespace, "chargpt"))
    wait("steps under the new plan", 60, lambda: len(log(namespace, "chargpt")) >= done + 10)
    assert uids(namespace, "chargpt") == before, "pods were made anew"
    lines = log(namespace, "chargpt")
    assert [line["step"] for line in lines] == list(range(len(lines))), "steps were lost or repeated"
    kubectl("delete", "trainingjob", "chargpt", "-n", namespace, "--wait=false")
    worst = same(losses(lines), local("chargpt", len(lines), adaptive("\"Off\"")))
    print(f"{len(lines)} steps, worst difference to a calm run in local mode {worst:.1e}")


def recut_under(name, disturbance):
    """A job trains in peace for 30 steps; then something slows it down."""
    namespace(name)
    apply(name, "chargpt", adaptive())
    wait("30 steps", 150, lambda: len(log(name, "chargpt")) >= 30)
    before = uids(name, "chargpt")
    with disturbance():
        recut(name, before)


@scenario(100)
def slow_node():
    """A worker gets less of its node: work moves away from it, in the same pods, and the losses stay what they were."""
    recut_under("slow-node", lambda: slow_worker("slow-node", "chargpt-1", 0.4))


@scenario(100)
def slow_link():
    """The network between the nodes becomes slow: the plan follows, in the same pods."""
    recut_under("slow-link", lambda: slow_network("60mbit"))


@scenario(100)
def approval():
    """A better plan is only recommended until somebody agrees, as the condition says how."""
    namespace("approval")
    apply("approval", "chargpt", adaptive("Recommend"))
    wait("30 steps", 150, lambda: len(log("approval", "chargpt")) >= 30)
    before = uids("approval", "chargpt")
    with slow_worker("approval", "chargpt-1", 0.4):

        def recommended():
            found = condition(get("trainingjob", "chargpt", "approval"), "Recommended")
            return found["message"] if found["status"] == "True" else None

        said = wait("a recommendation", 300, recommended)
        print(said)
        assert len(plans("approval")) == 1, "nobody has agreed"
        annotate = re.search(r"kubectl (annotate .*)", said)[1].split()
        kubectl(*annotate, "-n", "approval")
        recut("approval", before)
