#!/usr/bin/env python3
"""Scenarios on a real cluster: brings it up, installs the chart, runs the samples, and takes it down.

    e2e/run.py                     all scenarios
    e2e/run.py completes suspend   these
    e2e/run.py --keep completes    and leaves the cluster up
    e2e/run.py --existing=IMAGE    on the cluster that KUBECONFIG names, with an image it can fetch: what needs no access
                                   to nodes; its default storage class has to give volumes to several nodes at once

Needs root, Go and the packages that e2e/README.md lists.
"""

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
STATE = Path(os.environ.get("FORESHARD_CLUSTER", "/tmp/foreshard-cluster"))
BINARY = ROOT / "target/debug/foreshard"
PLUGIN = ROOT / ".foreshard/plugins/xla_plugins/xla_cpu_pjrt/xla_cpu_pjrt.so"
SYSTEM = "foreshard-system"
# An image for a cluster that is there already; none where the cluster is ours.
EXISTING = next((a.removeprefix("--existing=") for a in sys.argv if a.startswith("--existing=")), None)
INSIDE = [] if EXISTING else [ROOT / "e2e/cluster/cluster", "in"]
SCENARIOS = {}
# Those that look at nothing but the API server.
ANYWHERE = set()


def scenario(function):
    SCENARIOS[function.__name__] = function
    return function


def anywhere(function):
    ANYWHERE.add(function.__name__)
    return scenario(function)


def cluster(*args, **kwargs):
    return subprocess.run([ROOT / "e2e/cluster/cluster", *args], check=True, text=True, **kwargs)


def kubectl(*args, manifest=None, check=True):
    command = [*INSIDE, "kubectl", *args]
    done = subprocess.run(command, input=manifest, text=True, capture_output=True)
    if check and done.returncode != 0:
        raise RuntimeError(f"kubectl {' '.join(args)}: {done.stderr.strip()}")
    return done if not check else done.stdout


def get(kind, name, namespace):
    done = kubectl("get", kind, name, "-n", namespace, "-o", "json", check=False)
    return json.loads(done.stdout) if done.returncode == 0 else None


def items(kind, namespace, job=None):
    selector = ["-l", f"foreshard.dev/job={job}"] if job else []
    return json.loads(kubectl("get", kind, "-n", namespace, "-o", "json", *selector))["items"]


def condition(job, kind):
    found = [c for c in (job or {}).get("status", {}).get("conditions", []) if c["type"] == kind]
    return found[0] if found else {"status": "Unknown", "reason": "", "message": ""}


def wait(what, seconds, probe):
    """Waits until `probe` returns something true, and returns it."""
    deadline = time.monotonic() + seconds
    while True:
        found = probe()
        if found:
            return found
        if time.monotonic() > deadline:
            raise RuntimeError(f"{what} did not happen within {seconds} s")
        time.sleep(0.5)


def state(namespace, job, reason, seconds=120):
    def probe():
        now = get("trainingjob", job, namespace)
        failed = condition(now, "Failed")
        if failed["status"] == "True" and reason != "Failed":
            raise RuntimeError(f"{namespace}/{job} failed: {failed['message']}")
        return now if condition(now, "Training")["reason"] == reason else None

    return wait(f"{namespace}/{job} becomes {reason}", seconds, probe)


def results(namespace, job):
    found = sorted((STATE / "volumes" / namespace).glob(f"{job}-????????"))
    return found[0] if found else STATE / "none"


def log(namespace, job):
    """Lines of all runs of a job, in the order of the runs."""
    lines = []
    for run in sorted(results(namespace, job).glob("run-*"), key=lambda r: int(r.name[4:])):
        text = (run / "log.jsonl").read_text() if (run / "log.jsonl").exists() else ""
        lines += [json.loads(line) | {"run": run.name} for line in text.splitlines() if line.endswith("}")]
    return lines


def losses(lines):
    """By step: of a step that was taken again after a loss, the last one counts."""
    return {line["step"]: line["loss"] for line in lines}


def namespace(name):
    """A namespace for jobs under the strictest Pod Security, with a volume that all nodes see."""
    labels = {"pod-security.kubernetes.io/enforce": "restricted"}
    objects = [{"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name, "labels": labels}}]
    if not EXISTING:
        objects.append(volume(name))
    kubectl("apply", "-f", "-", manifest=json.dumps({"apiVersion": "v1", "kind": "List", "items": objects}))
    NAMESPACES.append(name)
    bundle = ROOT / "bundles/mlp_digits.bundle"
    files = [bundle, bundle / "grad", ROOT / "examples/data/digits.csv"]
    kubectl("create", "configmap", "digits", "-n", name, *[f"--from-file={f}" for f in files])
    kubectl("apply", "-n", name, "-f", str(ROOT / "manifests/samples/results.yaml"))


# Of scenarios so far.
NAMESPACES = []


def volume(name):
    """A directory of this machine, with a model and its data in it."""
    volume = STATE / "volumes" / name
    volume.mkdir(parents=True, exist_ok=True)
    shutil.copytree(ROOT / "bundles/char_gpt.bundle", volume / "char_gpt.bundle", dirs_exist_ok=True)
    shutil.copy(ROOT / "examples/data/tinyshakespeare.txt", volume)
    os.chown(volume, 65532, 65532)
    return {
        "apiVersion": "v1",
        "kind": "PersistentVolume",
        "metadata": {"name": f"results-{name}"},
        "spec": {
            "capacity": {"storage": "1Gi"},
            "accessModes": ["ReadWriteMany"],
            "hostPath": {"path": str(volume)},
            "claimRef": {"namespace": name, "name": "results"},
        },
    }


def apply(namespace, sample, change=lambda manifest: manifest, check=True):
    manifest = change((ROOT / f"manifests/samples/{sample}.yaml").read_text())
    return kubectl("apply", "-n", namespace, "-f", "-", manifest=manifest, check=check)


def steps(n):
    def change(manifest):
        lines = manifest.splitlines()
        return "\n".join(f"  steps: {n}" if line.startswith("  steps:") else line for line in lines) + "\n"

    return change


def replaced(*pairs):
    def change(manifest):
        for old, new in pairs:
            assert old in manifest, old
            manifest = manifest.replace(old, new)
        return manifest

    return change


def local(sample, n, change=lambda manifest: manifest):
    """Losses of the same manifest on this machine, with no cluster."""
    with tempfile.TemporaryDirectory() as directory:
        directory = Path(directory)
        (directory / "digits").mkdir()
        (directory / "results").mkdir()
        (directory / "digits/bundle").symlink_to(ROOT / "bundles/mlp_digits.bundle")
        (directory / "digits/digits.csv").symlink_to(ROOT / "examples/data/digits.csv")
        (directory / "results/char_gpt.bundle").symlink_to(ROOT / "bundles/char_gpt.bundle")
        (directory / "results/tinyshakespeare.txt").symlink_to(ROOT / "examples/data/tinyshakespeare.txt")
        manifest = directory / "job.yaml"
        manifest.write_text(change((ROOT / f"manifests/samples/{sample}.yaml").read_text()))
        command = [BINARY, "local", "run", manifest, "--steps", str(n), "--run-dir", "run", "-q", "--plugin", PLUGIN]
        subprocess.run(command, cwd=directory, check=True)
        text = (directory / "run/log.jsonl").read_text()
        return losses(json.loads(line) for line in text.splitlines())


# Cuts differ between one machine and two nodes, and with them the order of some sums.
TOLERANCE = 2e-3


def same(found, expected, tolerance=TOLERANCE):
    assert set(found) == set(expected), f"steps {sorted(set(expected) ^ set(found))[:5]} are missing or too many"
    off = {s: abs(found[s] - expected[s]) / max(abs(expected[s]), 0.1) for s in expected}
    step = max(off, key=off.get)
    every = " ".join(f"{off[s]:.0e}" for s in sorted(off)[:: max(1, len(off) // 20)])
    assert off[step] < tolerance, f"losses differ by {off[step]:.1e} at step {step}; now and then: {every}"
    return off[step]


def logs(namespace, job):
    """What containers of a job have logged: one JSON object per line, with the job in it."""
    entries = []
    for pod in items("pods", namespace, job):
        name, spec = pod["metadata"]["name"], pod["spec"]
        for container in spec.get("initContainers", []) + spec["containers"]:
            for line in kubectl("logs", "-n", namespace, name, "-c", container["name"]).splitlines():
                assert line.startswith("{"), f"{name}/{container['name']} logs no JSON: {line}"
                entries.append(json.loads(line) | {"container": container["name"]})
    return entries


def placed(namespace, job, n):
    """Pods of a job, when so many are bound to nodes."""
    pods = items("pods", namespace, job)
    return pods if len(pods) == n and all("nodeName" in p["spec"] for p in pods) else None


@anywhere
def completes():
    """The sample trains in pods on two nodes, with losses as in local mode, and the weights are on the volume."""
    namespace("completes")
    apply("completes", "digits")

    # Before the end: then the worker beside the head's may be gone, and its log with it.
    def begun():
        with contextlib.suppress(RuntimeError):
            entries = [e for e in logs("completes", "digits") if e["message"] == "begins"]
            return ("digits", 1, 1, 0) in [(e["job"], e["plan"], e["stage"], e["rank"]) for e in entries]

    pods = wait("two pods on nodes", 60, lambda: placed("completes", "digits", 2))
    wait("the second shard's first words", 60, begun)
    job = state("completes", "digits", "Complete", 150)
    plan = get("partitionplan", job["status"]["plan"], "completes")
    nodes = {s["node"] for s in plan["spec"]["shards"]}
    assert len(nodes) == 2, nodes
    assert {p["spec"]["nodeName"] for p in pods} == nodes
    assert plan["status"]["predicted"]["shards"][1]["ops"] > 0
    print(kubectl("get", "trainingjobs,partitionplans,pods", "-n", "completes", "-o", "wide"))
    if EXISTING:
        last = local("digits", 200)[199]
        assert abs(float(job["status"]["loss"]) - last) <= TOLERANCE * max(last, 0.1), job["status"]
        return
    found = losses(log("completes", "digits"))
    worst = same(found, local("digits", 200))
    assert found[199] < found[0] / 2, "the loss does not fall"
    assert list(results("completes", "digits").glob("run-1/weights.safetensors"))
    print(f"loss {found[0]:.4f} -> {found[199]:.4f}, worst difference to local mode {worst:.1e}")


@anywhere
def two_jobs():
    """Two jobs at once in two namespaces, each with devices of its own."""
    for name in ("one", "two"):
        namespace(name)
    for name in ("one", "two"):
        apply(name, "digits")
    last = [state(name, "digits", "Complete", 200)["status"]["loss"] for name in ("one", "two")]
    assert last[0] == last[1], f"the same job gives the same losses: {last}"


@scenario
def suspend():
    """Suspended mid-run, all pods go; resumed, it goes on at the step of its last checkpoint."""
    namespace("suspend")
    apply("suspend", "chargpt")
    wait("8 steps", 150, lambda: len(log("suspend", "chargpt")) >= 8)
    patch = '{"spec": {"suspend": %s}}'
    kubectl("patch", "trainingjob", "chargpt", "-n", "suspend", "--type=merge", "-p", patch % "true")
    state("suspend", "chargpt", "Suspended", 60)
    assert items("pods", "suspend", "chargpt") == []
    last = log("suspend", "chargpt")[-1]["step"]
    kubectl("patch", "trainingjob", "chargpt", "-n", "suspend", "--type=merge", "-p", patch % "false")
    state("suspend", "chargpt", "Complete", 150)
    second = [line["step"] for line in log("suspend", "chargpt") if line["run"] == "run-2"]
    assert second[0] == last + 1, f"stopped after step {last}, went on at {second[0]}"
    print(f"stopped after step {last}, went on at step {second[0]}")
    worst = same(losses(log("suspend", "chargpt")), local("chargpt", 60))
    print(f"worst difference to an uninterrupted run in local mode {worst:.1e}")


@anywhere
def delete():
    """Deleted mid-run, nothing is left but the results."""
    namespace("delete")
    apply("delete", "digits", steps(1_000_000))
    state("delete", "digits", "Running", 150)
    kubectl("delete", "trainingjob", "digits", "-n", "delete", "--wait=false")
    kinds = "pods,services,configmaps,secrets,networkpolicies,partitionplans"
    wait("everything of the job is gone", 150, lambda: items(kinds, "delete", "digits") == [])


def holder():
    lease = get("lease", "foreshard-operator", SYSTEM)
    return lease["spec"].get("holderIdentity", "") if lease else ""


@scenario
def operator_restart():
    """With the leading operator killed, training goes on; another takes over and repeats nothing."""
    namespace("restart")
    apply("restart", "chargpt")
    wait("3 steps", 150, lambda: len(log("restart", "chargpt")) >= 3)
    before = {p["metadata"]["name"]: p["metadata"]["uid"] for p in items("pods", "restart", "chargpt")}
    kubectl("scale", "deployment/foreshard", "-n", SYSTEM, "--replicas=2")
    kubectl("rollout", "status", "deployment/foreshard", "-n", SYSTEM, "--timeout=30s")
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


@scenario
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


@scenario
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


@scenario
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
    """The worker in a pod gets only so much of a core, as it would beside others on its node."""
    statuses = get("pod", pod, namespace)["status"]["containerStatuses"]
    container = statuses[0]["containerID"].removeprefix("containerd://")
    [quota] = Path("/sys/fs/cgroup/cpu").rglob(f"{container}/cpu.cfs_quota_us")
    before = quota.read_text()
    quota.write_text(str(int(share * int((quota.parent / "cpu.cfs_period_us").read_text()))))
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


def uids(namespace, job):
    return {p["metadata"]["name"]: p["metadata"]["uid"] for p in items("pods", namespace, job)}


def plans(namespace):
    return sorted(items("partitionplans", namespace), key=lambda p: p["spec"]["revision"])


def recut(namespace, before, seconds=150):
    """Waits for a recut in the pods that are there, and for steps under it; every step is taken once, with the same loss."""
    found = wait("a recut", seconds, lambda: len(plans(namespace)) > 1 and plans(namespace))
    assert found[1]["spec"]["shards"] == found[0]["spec"]["shards"], "other seats"
    print(f"revision 2: {found[1]['spec']['reason']}")
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


@scenario
def slow_node():
    """A worker gets less of its node: work moves away from it, in the same pods, and the losses stay what they were."""
    recut_under("slow-node", lambda: slow_worker("slow-node", "chargpt-1", 0.4))


@scenario
def slow_link():
    """The network between the nodes becomes slow: the plan follows, in the same pods."""
    recut_under("slow-link", lambda: slow_network("60mbit"))


@scenario
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

        said = wait("a recommendation", 120, recommended)
        print(said)
        assert len(plans("approval")) == 1, "nobody has agreed"
        annotate = re.search(r"kubectl (annotate .*)", said)[1].split()
        kubectl(*annotate, "-n", "approval")
        recut("approval", before)


@anywhere
def refused():
    """Manifests that cannot work are refused by the API server, with the field and the way out."""
    namespace("refused")
    for change, says in [
        (replaced(("bundle: digits/bundle", "bundle: elsewhere/bundle")), "bundle must lie on a volume"),
        (replaced(("  results: results\n", "  results: digits\n")), "results must name one of spec.volumes"),
        (replaced(("shards: 2", "shards: 0")), "spec.parallelism.shards"),
        (replaced(("shards: 2", "shards: 3\n    cuts: [a]")), "give one cut fewer than shards"),
        (replaced(("uri: digits/digits.csv", "uri: a\n    socket: b")), "give either uri or socket"),
        (replaced(("claimName: results", "claimName: results\n      image: {reference: a}")), "has exactly one of"),
        (replaced(("name: digits\nspec", "name: 9.digits\nspec")), "named after the job"),
    ]:
        done = apply("refused", "digits", change, check=False)
        assert done.returncode != 0, f"{says!r} was let in"
        assert says in done.stderr, f"{says!r} is not in {done.stderr!r}"
        print(done.stderr.strip().splitlines()[-1])


@scenario
def impossible():
    """A job that nothing has room for says so, and starts when room appears."""
    namespace("impossible")
    kubectl("cordon", "node-2")
    try:
        apply("impossible", "digits")
        job = state("impossible", "digits", "Waiting", 30)
        said = condition(job, "Placed")["message"]
        print(said)
        assert "there is room for 1" in said and "starts as soon as there is room" in said, said
        assert items("pods", "impossible") == []
    finally:
        kubectl("uncordon", "node-2")
    state("impossible", "digits", "Complete", 150)


def chart(version, directory, without):
    """The chart as an earlier version would have been: without a field in its definitions."""
    old = Path(directory) / "foreshard"
    shutil.copytree(ROOT / "charts/foreshard", old)
    about = old / "Chart.yaml"
    about.write_text(re.sub(r"(?m)^version: .*$", f"version: {version}", about.read_text()))
    crd = old / "files/crds/trainingjobs.yaml"
    text = re.sub(rf"(?m)^( +){without}:\n(?:\1 +.*\n)+", "", crd.read_text())
    assert text != crd.read_text(), f"there is no {without}"
    crd.write_text(text)
    done = subprocess.run([*HELM, "package", old, "-d", directory], check=True, text=True, capture_output=True)
    return done.stdout.strip().rsplit(" ", 1)[-1]


@scenario
def upgrade():
    """The chart is upgraded from an earlier version mid-run: definitions follow, and training goes on."""
    subprocess.run([*HELM, "uninstall", "foreshard", "-n", SYSTEM, "--wait"], check=True, stdout=subprocess.DEVNULL)
    kubectl("delete", "crd", "trainingjobs.foreshard.dev")
    with tempfile.TemporaryDirectory() as directory:
        install(chart=chart("0.0.9", directory, "throughput"))
    namespace("upgrade")
    apply("upgrade", "chargpt", steps(200))
    wait("10 steps", 150, lambda: len(log("upgrade", "chargpt")) >= 10)
    before = uids("upgrade", "chargpt")
    assert "throughput" not in get("trainingjob", "chargpt", "upgrade")["status"]
    install("--set", "log=debug")
    wait("the new field", 60, lambda: get("trainingjob", "chargpt", "upgrade")["status"].get("throughput"))
    done = len(log("upgrade", "chargpt"))
    wait("10 more steps", 60, lambda: len(log("upgrade", "chargpt")) >= done + 10)
    assert uids("upgrade", "chargpt") == before, "pods were made anew"
    found = [line["step"] for line in log("upgrade", "chargpt")]
    assert found == list(range(len(found))), "steps were lost or repeated"
    print(f"{get('trainingjob', 'chargpt', 'upgrade')['status']['throughput']} after {len(found)} steps")
    install()


@scenario
def uninstall():
    """Uninstalled, definitions and jobs stay; installed again or upgraded, the operator goes on with them."""
    namespace("uninstall")
    apply("uninstall", "digits")
    before = state("uninstall", "digits", "Complete", 150)
    subprocess.run([*HELM, "uninstall", "foreshard", "-n", SYSTEM, "--wait"], check=True, stdout=subprocess.DEVNULL)
    assert get("trainingjob", "digits", "uninstall")["metadata"]["uid"] == before["metadata"]["uid"]
    assert len(items("partitionplans", "uninstall")) == 1
    install()
    install("--set", "replicas=2")
    apply("uninstall", "digits", replaced(("name: digits\nspec", "name: again\nspec")))
    state("uninstall", "again", "Complete", 150)
    plain = subprocess.run([ROOT / "scripts/plain-install.sh"], check=True, text=True, capture_output=True).stdout
    committed = (ROOT / "manifests/install/foreshard.yaml").read_text()
    assert plain == committed, "manifests/install is not what the chart makes now; run make manifests"
    kubectl("apply", "--dry-run=server", "-f", str(ROOT / "manifests/install/foreshard.yaml"))


def figures():
    """Counters of the operator that leads, and its memory in MiB."""
    path = f"/api/v1/namespaces/{SYSTEM}/pods/{holder()}"
    lines = kubectl("get", "--raw", f"{path}:8080/proxy/metrics").splitlines()
    counters = {line.split()[0]: int(float(line.split()[1])) for line in lines if not line.startswith("#")}
    node = get("pod", holder(), SYSTEM)["spec"]["nodeName"]
    stats = json.loads(kubectl("get", "--raw", f"/api/v1/nodes/{node}/proxy/stats/summary"))
    memory = [p["memory"]["workingSetBytes"] for p in stats["pods"] if p["podRef"]["name"] == holder()]
    names = ("reconciles", "writes", "errors")
    return {n: counters[f"foreshard_operator_{n}_total"] for n in names} | {"MiB": memory[0] / 2**20 if memory else 0}


@anywhere
def many():
    """A hundred jobs that wait for room: each is told why, and then nothing is written any more."""
    namespace("many")
    manifest = replaced(("    cores: 1\n", "    cores: 64\n"))((ROOT / "manifests/samples/digits.yaml").read_text())
    jobs = [manifest.replace("name: digits\nspec", f"name: j{i}\nspec") for i in range(100)]
    before, start = figures(), time.monotonic()
    kubectl("apply", "-n", "many", "-f", "-", manifest="---\n".join(jobs))
    applied = time.monotonic() - start

    def waiting():
        return all(condition(j, "Training")["reason"] == "Waiting" for j in items("trainingjobs", "many"))

    wait("all jobs wait", 60, waiting)
    told = time.monotonic() - start
    after = figures()
    time.sleep(15)
    rest = figures()
    print(f"100 jobs applied in {applied:.1f} s, all told why they wait after {told:.1f} s")
    print(f"writes per job {(after['writes'] - before['writes']) / 100:.1f}, in 15 s at rest {rest['writes'] - after['writes']}")
    print(f"looks in 15 s at rest {rest['reconciles'] - after['reconciles']}, operator {rest['MiB']:.0f} MiB")
    assert rest["writes"] == after["writes"], "an idle cluster costs writes"
    assert rest["errors"] == before["errors"]


HELM = [*INSIDE, "helm"]


def install(*more, chart=ROOT / "charts/foreshard"):
    repository, tag = (EXISTING or "foreshard.dev/foreshard:e2e").rsplit(":", 1)
    image = ["--set", f"image.repository={repository}", "--set", f"image.tag={tag}"]
    values = [*image, "--set", "resources=null", "--set", "log=info"]
    command = ["upgrade", "--install", "foreshard", chart, "-n", SYSTEM, "--create-namespace"]
    subprocess.run([*HELM, *command, *values, *more, "--wait", "--timeout", "60s"], check=True, stdout=subprocess.DEVNULL)


def explain():
    """What may tell why a scenario failed."""
    for args in (
        ["get", "nodes"],
        ["get", "trainingjobs,partitionplans,pods", "-A", "-o", "wide"],
        ["get", "events.events.k8s.io", "-A"],
        ["logs", "-n", SYSTEM, "deploy/foreshard", "--tail=30"],
    ):
        print(kubectl(*args, check=False).stdout)
    for name in NAMESPACES:
        for pod in items("pods", name):
            logs = kubectl("logs", "-n", name, pod["metadata"]["name"], "--all-containers", "--tail=15", check=False)
            print(pod["metadata"]["name"], json.dumps(pod["status"].get("containerStatuses", []))[:1500])
            print(logs.stdout)


def main():
    args = [a for a in sys.argv[1:] if not a.startswith("--")]
    unknown = [a for a in args if a not in SCENARIOS]
    if unknown:
        sys.exit(f"no scenario {unknown[0]!r}; there are {', '.join(SCENARIOS)}")
    chosen = [n for n in args or SCENARIOS if not EXISTING or n in ANYWHERE]
    began = time.monotonic()
    if not EXISTING:
        cluster("up")
    failed = []
    try:
        install()
        for name in chosen:
            start = time.monotonic()
            try:
                SCENARIOS[name]()
                print(f"ok     {name} ({time.monotonic() - start:.0f} s)", flush=True)
            except (RuntimeError, AssertionError) as e:
                failed.append(name)
                print(f"FAILED {name}: {e}", flush=True)
                explain()
            for used in NAMESPACES:
                kubectl("delete", "trainingjobs", "--all", "-n", used, "--wait=false", check=False)
    finally:
        if EXISTING:
            kubectl("delete", "namespace", "--ignore-not-found", "--wait=false", *NAMESPACES, check=False)
        elif "--keep" not in sys.argv:
            cluster("down")
    n_passed = len(chosen) - len(failed)
    print(f"{time.monotonic() - began:.0f} s\n{n_passed} passed, {len(failed)} failed")
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
