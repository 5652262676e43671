"""A cluster from the outside: what scenarios look at, and what they do to it."""

import json
import os
import shutil
import subprocess
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

ROOT = Path(__file__).resolve().parent.parent
STATE = Path(os.environ.get("FORESHARD_CLUSTER", "/tmp/foreshard-cluster"))
BINARY = Path(os.environ.get("FORESHARD_BINARY", ROOT / "target/debug/foreshard"))
PLUGIN = ROOT / ".foreshard/plugins/xla_plugins/xla_cpu_pjrt/xla_cpu_pjrt.so"
SYSTEM = "foreshard-system"
# An image for a cluster that is there already; none where the cluster is ours.
SITE = SimpleNamespace(existing=None)


def inside():
    """What stands before a command so that it reaches the API server."""
    return [] if SITE.existing else [ROOT / "e2e/cluster/cluster", "in"]


def cluster(*args, **kwargs):
    return subprocess.run([ROOT / "e2e/cluster/cluster", *args], check=True, text=True, **kwargs)


def kubectl(*args, manifest=None, check=True):
    command = [*inside(), "kubectl", *args]
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
    if not SITE.existing:
        objects.append(volume(name))
    kubectl("apply", "-f", "-", manifest=json.dumps({"apiVersion": "v1", "kind": "List", "items": objects}))
    NAMESPACES.append(name)
    bundle = ROOT / "bundles/mlp_digits.bundle"
    files = [bundle, bundle / "grad", ROOT / "examples/data/digits.csv"]
    kubectl("create", "configmap", "digits", "-n", name, *[f"--from-file={f}" for f in files])
    kubectl("apply", "-n", name, "-f", str(ROOT / "manifests/samples/results.yaml"))


# Made since the cluster came up.
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


def forget():
    """Takes away all namespaces of scenarios, and what they have written."""
    if not NAMESPACES:
        return
    kubectl("delete", "namespace", "--ignore-not-found", "--timeout=200s", *NAMESPACES)
    if not SITE.existing:
        for name in NAMESPACES:
            kubectl("delete", "persistentvolume", f"results-{name}", "--ignore-not-found")
            shutil.rmtree(STATE / "volumes" / name, ignore_errors=True)
    NAMESPACES.clear()


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


def uids(namespace, job):
    return {p["metadata"]["name"]: p["metadata"]["uid"] for p in items("pods", namespace, job)}


def plans(namespace):
    return sorted(items("partitionplans", namespace), key=lambda p: p["spec"]["revision"])


def cpu(pid):
    """Seconds that a process has computed."""
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def holder():
    lease = get("lease", "foreshard-operator", SYSTEM)
    return lease["spec"].get("holderIdentity", "") if lease else ""


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


def helm(*args):
    done = subprocess.run([*inside(), "helm", *args], text=True, capture_output=True)
    if done.returncode != 0:
        raise RuntimeError(f"helm {args[0]}: {done.stderr.strip()}")
    return done.stdout


def install(*more, chart=ROOT / "charts/foreshard"):
    repository, tag = (SITE.existing or "foreshard.dev/foreshard:e2e").rsplit(":", 1)
    image = ["--set", f"image.repository={repository}", "--set", f"image.tag={tag}"]
    values = [*image, "--set", "resources=null", "--set", "log=info"]
    command = ["upgrade", "--install", "foreshard", chart, "-n", SYSTEM, "--create-namespace"]
    helm(*command, *values, *more, "--wait", "--timeout", "60s")
    # One that is told to go still decides for a moment, by what it was told when it came.
    gone = lambda: all("deletionTimestamp" not in pod["metadata"] for pod in items("pods", SYSTEM))  # noqa: E731
    wait("the operators of before are gone", 60, gone)


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
