#!/usr/bin/env python3
"""Figures of the operator at scale: many jobs on fake nodes, before a real API server, scheduler and garbage collector.

    e2e/scale.py              100 and 1,000 jobs of two workers
    e2e/scale.py 50           as many as said

Pods are bound and run on nodes that KWOK pretends to be. The operator runs beside the API server as a process of its own,
FORESHARD_BINARY or target/debug/foreshard. Needs root; see README.md.
"""

import json
import os
import re
import resource
import subprocess
import sys
import time
from pathlib import Path

from kit import BINARY, ROOT, STATE, cluster, cpu, kubectl, wait

KWOK = ROOT / ".foreshard/cluster/bin/kwok"
SYSTEM = "foreshard-system"
WORKERS, NODES, CORES = 2, 20, 256
# One kubectl makes 50 objects a second at most: so many at once ask for more than the operator can do.
CREATORS = 8
# Jobs whose objects are made at once by the client that does nothing else: as many as the operator looks at.
BARE = 8


def job(i):
    spec = {
        "bundle": "work/m.bundle",
        "data": {"uri": "work/x.txt"},
        "parallelism": {"shards": WORKERS},
        "resources": {"cores": 1, "memory": "1Gi"},
        "volumes": [{"name": "work", "persistentVolumeClaim": {"claimName": "work"}}],
    }
    return {"apiVersion": "foreshard.dev/v1alpha1", "kind": "TrainingJob", "metadata": {"name": f"j{i}"}, "spec": spec}


def node(i):
    name = f"fake-{i}"
    room = {"cpu": str(CORES), "memory": "1Ti", "pods": "1000"}
    labels = {"kubernetes.io/hostname": name, "topology.kubernetes.io/zone": f"z{i % 4}"}
    metadata = {"name": name, "labels": labels, "annotations": {"kwok.x-k8s.io/node": "fake"}}
    return {"apiVersion": "v1", "kind": "Node", "metadata": metadata, "status": {"allocatable": room, "capacity": room}}


def inside(log, *command):
    """Starts a program where the API server can be reached."""
    netns = ["nsenter", "--net=/run/netns/cp", "--"]
    environment = os.environ | {"KUBECONFIG": str(STATE / "admin.kubeconfig")}
    return subprocess.Popen([*netns, *command], env=environment, stdout=log, stderr=log)


def metrics():
    text = cluster("in", "curl", "-s", "http://127.0.0.1:8080/metrics", capture_output=True).stdout
    lines = [line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#")]
    return {name.removeprefix("foreshard_operator_"): float(value) for name, value in lines}


# What nobody but the operator writes here, as the API server names it.
WRITTEN = {
    "POST partitionplans", "POST secrets", "POST configmaps", "POST services", "POST networkpolicies", "POST pods",
    "PATCH pods", "APPLY trainingjobs/status", "APPLY partitionplans/status", "APPLY configmaps", "APPLY services",
    "APPLY networkpolicies", "APPLY modelprofiles",
}  # fmt: skip


def written():
    """How often the API server was asked for each of these."""
    found = dict.fromkeys(WRITTEN, 0)
    for line in kubectl("get", "--raw", "/metrics").splitlines():
        if line.startswith("apiserver_request_total{"):
            labels = dict(re.findall(r'(\w+)="([^"]*)"', line))
            what = f"{labels['verb']} {labels['resource']}" + (f"/{labels['subresource']}" if labels["subresource"] else "")
            if what in WRITTEN:
                found[what] += float(line.rsplit(" ", 1)[1])
    return found


def quantile(before, after, share):
    """The bound below which this share of looks lies."""
    buckets = [name for name in after if name.startswith("reconcile_seconds_bucket")]
    total = after["reconcile_seconds_count"] - before["reconcile_seconds_count"]
    for name in buckets:
        if after[name] - before[name] >= share * total:
            return name.split('"')[1]
    return "?"


def memory(process):
    """MiB of a process now, and at most."""
    status = Path(f"/proc/{process.pid}/status").read_text().splitlines()
    fields = dict(line.split(":", 1) for line in status)
    return [int(fields[name].split()[0]) / 1024 for name in ("VmRSS", "VmHWM")]


def apply(objects, *more):
    kubectl("apply", *more, "-f", "-", manifest=json.dumps({"apiVersion": "v1", "kind": "List", "items": objects}))


def create(namespace, which):
    """Begins to make jobs. kubectl apply would ask for each object first; create does not."""
    command = [ROOT / "e2e/cluster/cluster", "in", "kubectl", "create", "-n", namespace, "-f", "-"]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
    process.stdin.write(json.dumps({"apiVersion": "v1", "kind": "List", "items": [job(i) for i in which]}))
    process.stdin.close()
    return process


def computed(programs):
    """The same by name: of everything that shares this machine's cores. What has ended is kubectl."""
    names = {"etcd": "etcd", "apiserver": "API server", "kcm": "controllers", "scheduler": "scheduler"}
    found = {name: cpu((STATE / "pids" / file).read_text().strip()) for file, name in names.items()}
    ended = resource.getrusage(resource.RUSAGE_CHILDREN)
    return found | {name: cpu(p.pid) for name, p in programs.items()} | {"kubectl": ended.ru_utime + ended.ru_stime}


def count(kind, namespace):
    """How many there are, without fetching them all."""
    path = {"pods": "/api/v1", "trainingjobs": "/apis/foreshard.dev/v1alpha1"}[kind]
    one = json.loads(kubectl("get", "--raw", f"{path}/namespaces/{namespace}/{kind}?limit=1"))
    return len(one["items"]) + one["metadata"].get("remainingItemCount", 0)


def prepare(namespace):
    """A namespace whose pods find their volume."""
    kubectl("create", "namespace", namespace)
    apply([{
        "apiVersion": "v1", "kind": "PersistentVolumeClaim", "metadata": {"name": "work", "namespace": namespace},
        "spec": {
            "accessModes": ["ReadWriteMany"], "storageClassName": "", "volumeName": namespace,
            "resources": {"requests": {"storage": "1Gi"}},
        },
    }, {
        "apiVersion": "v1", "kind": "PersistentVolume", "metadata": {"name": namespace},
        "spec": {
            "capacity": {"storage": "1Gi"}, "accessModes": ["ReadWriteMany"], "hostPath": {"path": "/tmp"},
            "claimRef": {"namespace": namespace, "name": "work"}, "storageClassName": "",
        },
    }])  # fmt: skip
    account = ["get", "serviceaccount", "default", "-n", namespace]
    wait("pods may be made", 30, lambda: kubectl(*account, check=False).returncode == 0)


# What the operator makes for a job, in its order: what stands in one list waits for nothing in it.
MADE = ["partitionplans"], ["secrets", "configmaps", "services", "networkpolicies"], ["pods"]


def made(namespace):
    """By kind and job: what stands in a namespace, as it could be made again."""
    found = {}
    for kind in (kind for step in MADE for kind in step):
        for o in json.loads(kubectl("get", kind, "-n", namespace, "-l", "foreshard.dev/job", "-o", "json"))["items"]:
            metadata = {key: o["metadata"][key] for key in ("name", "labels", "annotations") if key in o["metadata"]}
            again = {key: value for key, value in o.items() if key != "status"} | {"metadata": metadata}
            if kind == "services":
                del again["spec"]["clusterIPs"]
            if kind == "pods":
                # The scheduler puts it where it belongs, as it does with those of the operator.
                again["spec"].pop("nodeName", None)
            found.setdefault((kind, metadata["labels"]["foreshard.dev/job"]), []).append(again)
    return found


def bare(n, what, found, steps, programs):
    """Seconds in which a client that does nothing else makes the same, what a request takes, and what others compute for it."""
    namespace = f"bare-{what}-{n}"
    prepare(namespace)

    def of(i, step):
        objects = [o for kind in step for o in found[kind, f"j{i}"]]
        return [o | {"metadata": o["metadata"] | {"namespace": namespace}} for o in objects]

    lines = "".join(json.dumps([of(i, step) for step in steps]) + "\n" for i in range(n))
    began = computed(programs)
    seconds, took = json.loads(cluster("in", ROOT / "e2e/bare.py", str(BARE), input=lines, capture_output=True).stdout)
    ended = computed(programs)
    kubectl("delete", "namespace", namespace, "--wait=false")
    wait("pods are gone", 600, lambda: count("pods", namespace) == 0)
    return seconds, took, {name: ended[name] - began[name] for name in ended}


def measure(n, programs):
    operator = programs["operator"]
    namespace = f"scale-{n}"
    prepare(namespace)
    asked = written()
    before, start, began = metrics(), time.monotonic(), computed(programs)
    creating = [create(namespace, range(first, n, CREATORS)) for first in range(CREATORS)]
    applied = None

    def all_pods():
        nonlocal applied
        if applied is None and all(process.poll() is not None for process in creating):
            applied = time.monotonic() - start
        return count("pods", namespace) >= n * WORKERS

    wait("all pods are there", 900, all_pods)
    made_in = time.monotonic() - start
    assert [process.wait() for process in creating] == [0] * CREATORS
    applied = applied or made_in
    split = {name: seconds - began[name] for name, seconds in computed(programs).items()}

    def running():
        # With a selector, the API server does not say how many remain.
        path = f"/api/v1/namespaces/{namespace}/pods?fieldSelector=status.phase!%3DRunning&limit=1"
        return not json.loads(kubectl("get", "--raw", path))["items"]

    try:
        wait("all pods run", 300, running)
        ran = f"{time.monotonic() - start:.1f} s"
    except RuntimeError:
        ran = "not within 300 s"
    after = metrics()
    asked = {what: n_asked - asked[what] for what, n_asked in written().items()}
    looks, writes = (after[f"{name}_total"] - before[f"{name}_total"] for name in ("reconciles", "writes"))
    mean = (after["reconcile_seconds_sum"] - before["reconcile_seconds_sum"]) / max(looks, 1)
    time.sleep(20)
    rest, later, calm = metrics(), 30, cpu(operator.pid)
    time.sleep(later)
    end, calm = metrics(), cpu(operator.pid) - calm
    now, most = memory(operator)
    print(f"{n} jobs of {WORKERS} workers on {NODES} nodes")
    print(f"  jobs created in                  {applied:.1f} s: {n / applied:.0f} jobs/s, by {CREATORS} kubectl at once")
    print(f"  all pods created after           {made_in:.1f} s: {n * WORKERS / made_in:.0f} pods/s; all run after {ran}")
    latency = f"mean {mean * 1e3:.1f} ms, half within {quantile(before, after, 0.5)} s"
    print(f"  look at a job                    {latency}, 99 of 100 within {quantile(before, after, 0.99)} s")
    print(f"  looks per job                    {looks / n:.1f}, writes per job {writes / n:.1f}, per look {writes / looks:.2f}")
    kinds = sorted(asked.items(), key=lambda item: (-item[1], item[0]))
    print(f"  of these                         {', '.join(f'{what} {times / n:.1f}' for what, times in kinds if times >= 0.05 * n)}")
    told = ", ".join(f"{name} {seconds:.1f}" for name, seconds in sorted(split.items(), key=lambda item: -item[1]))
    print(f"  computed until all pods were     {sum(split.values()):.0f} of {made_in * os.cpu_count():.0f} s: {told}")
    print(f"  of it for one job                {sum(split.values()) / n * 1e3:.0f} ms, by the operator {split['operator'] / n * 1e3:.1f} ms")
    print(f"  errors                           {after['errors_total'] - before['errors_total']:.0f}")
    print(f"  writes in {later} s at rest          {end['writes_total'] - rest['writes_total']:.0f}")
    print(f"  looks in {later} s at rest           {end['reconciles_total'] - rest['reconciles_total']:.0f}")
    print(f"  the operator computed at rest    {calm:.1f} s in {later} s: {1e3 * calm / max(end['reconciles_total'] - rest['reconciles_total'], 1):.1f} ms a look")
    print(f"  memory of the operator           {now:.0f} MiB, at most {most:.0f} MiB", flush=True)
    found = made(namespace)
    kubectl("delete", "trainingjobs", "--all", "-n", namespace, "--wait=false")
    wait("pods are collected", 600, lambda: count("pods", namespace) == 0)
    for what, steps in (("pods", [["pods"]]), ("all", MADE)):
        seconds, took, others = bare(n, what, found, steps, programs)
        told = "the same pods" if what == "pods" else "all the same objects"
        pace = f"{seconds:.1f} s: {n * WORKERS / seconds:.0f} pods/s"
        print(f"  {told + ', bare':33}{pace}; the operator has {seconds / made_in:.2f} of it")
        print(f"    a request took                 {', '.join(f'{kind} {ms} ms' for kind, ms in took.items())}")
        cost = {name: others[name] for name in ("API server", "etcd", "controllers", "scheduler", "KWOK")}
        told = ", ".join(f"{name} {s:.1f}" for name, s in cost.items())
        share = sum(cost.values()) / sum(split[name] for name in cost)
        print(f"    computed for it                {sum(cost.values()):.1f} s, {share:.2f} of what they did for the operator: {told}", flush=True)


def main():
    sizes = [int(a) for a in sys.argv[1:]] or [100, 1000]
    subprocess.run([ROOT / "e2e/cluster/build", "kwok"], check=True)
    cluster("up")
    programs = {}
    try:
        with open(STATE / "logs/scale-kwok.log", "w") as kwok, open(STATE / "logs/scale-operator.log", "w") as log:
            apply([node(i) for i in range(NODES)])
            fake = "--manage-nodes-with-annotation-selector=kwok.x-k8s.io/node=fake"
            # The controller manager waits 12 s for a sign of life; KWOK renews a lease after a quarter of its time.
            lease = "--node-lease-duration-seconds=8"
            programs["KWOK"] = inside(kwok, str(KWOK), "--manage-all-nodes=false", fake, lease)
            ready = "{.items[*].status.conditions[?(@.type=='Ready')].status}"
            wait("nodes are ready", 60, lambda: kubectl("get", "nodes", "-o", f"jsonpath={ready}").count("True") > NODES)
            # Only fake nodes: a pod on a real one would try to start.
            kubectl("cordon", "node-1", "node-2")
            crds = subprocess.run([BINARY, "crd"], check=True, text=True, capture_output=True).stdout
            kubectl("apply", "--server-side", "-f", "-", manifest=crds)
            kubectl("wait", "--for=condition=Established", "crd/trainingjobs.foreshard.dev", "--timeout=30s")
            kubectl("create", "namespace", SYSTEM)
            command = [str(BINARY), "operator", "--image=none", "--listen=127.0.0.1:8080", f"--namespace={SYSTEM}"]
            programs["operator"] = inside(log, *command)
            lease = ["get", "lease", "foreshard-operator", "-n", SYSTEM]
            wait("the operator leads", 60, lambda: kubectl(*lease, check=False).returncode == 0)
            for n in sizes:
                measure(n, programs)
    finally:
        for program in programs.values():
            program.terminate()
            program.wait()
        if "--keep" not in sys.argv:
            cluster("down")


if __name__ == "__main__":
    main()
