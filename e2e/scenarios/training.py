"""Jobs that train: to the end, side by side, with a pause, and until they are deleted."""

import contextlib
import hashlib
import json
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

from kit import (
    ROOT,
    SITE,
    STATE,
    TOLERANCE,
    apply,
    condition,
    get,
    items,
    kubectl,
    local,
    log,
    logs,
    losses,
    namespace,
    placed,
    replaced,
    results,
    same,
    state,
    steps,
    wait,
)
from scenarios import anywhere, scenario


@anywhere(35)
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
    if SITE.existing:
        last = local("digits", 200)[199]
        assert abs(float(job["status"]["loss"]) - last) <= TOLERANCE * max(last, 0.1), job["status"]
        return
    found = losses(log("completes", "digits"))
    worst = same(found, local("digits", 200))
    assert found[199] < found[0] / 2, "the loss does not fall"
    assert list(results("completes", "digits").glob("run-1/weights.safetensors"))
    print(f"loss {found[0]:.4f} -> {found[199]:.4f}, worst difference to local mode {worst:.1e}")


@anywhere(65)
def two_jobs():
    """Two jobs at once in two namespaces, each with devices of its own; a third finds what the first has learned."""
    for name in ("one", "two"):
        namespace(name)
    for name in ("one", "two"):
        apply(name, "digits")
    last = [state(name, "digits", "Complete", 200)["status"]["loss"] for name in ("one", "two")]
    assert last[0] == last[1], f"the same job gives the same losses: {last}"
    learns_from("one", "digits")


def learns_from(name, first):
    """A later job of the same bundle plans with what was measured. It takes as many devices as are free in its range, and is
    cut as its manifest says."""
    # What still runs takes room, and a job takes what is free.
    done = lambda: all(p["status"]["phase"] == "Succeeded" for n in ("one", "two") for p in items("pods", n))  # noqa: E731
    wait("all pods have ended", 60, done)
    [profile] = items("modelprofiles", name)
    [costs] = profile["spec"]["devices"]
    assert profile["spec"]["job"] == first and costs["kind"] == "cpu", profile["spec"]
    ranged = replaced(
        ("name: digits\nspec", "name: ranged\nspec"),
        ("  parallelism:\n    shards: 2\n", "  partition: {granularity: layer, objective: memory}\n"),
        ("    cores: 1\n", "    cores: 1\n    devices: [{name: cpu, min: 1, max: 2}]\n"),
    )
    apply(name, "digits", ranged)
    job = state(name, "ranged", "Complete", 150)
    assert job["status"]["shards"] == 2, job["status"]
    given = json.loads(get("configmap", f"ranged-{job['metadata']['uid'][:8]}", name)["data"]["profiles.json"])
    assert given == {profile["spec"]["bundle"]: {"cpu": {k: v for k, v in costs.items() if k != "kind"}}}, given
    before, after = (get("partitionplan", f"{j}-plan-1", name)["status"]["predicted"] for j in (first, "ranged"))
    print(f"predicted {before['step']} by nominal figures, {after['step']} by measured ones")
    print(f"ops by shard {[s['ops'] for s in before['shards']]}, in whole layers {[s['ops'] for s in after['shards']]}")


@contextlib.contextmanager
def served(directory):
    """Files of a directory over HTTP, where pods of both nodes can fetch them: the URL of the directory."""
    address, port = "10.89.0.1", "8000"
    server = [sys.executable, "-m", "http.server", port, "--bind", address, "--directory", directory]
    log = open(STATE / "logs/http.log", "w")
    process = subprocess.Popen(["nsenter", "--net=/run/netns/cp", "--", *server], stdout=log, stderr=log)
    try:
        yield f"http://{address}:{port}"
    finally:
        process.terminate()
        process.wait()
        log.close()


@scenario(45)
def fetched():
    """The bundle comes over HTTP or from S3: of the wrong digest it is refused, what is not there yet is waited for, then it
    trains."""
    namespace("fetched")

    def from_archive(url, sha256, name, more=""):
        archive = f"    - name: models\n      archive: {{url: {url}, sha256: \"{sha256}\"{more}}}\n"
        return replaced(
            ("bundle: digits/bundle", "bundle: models/mlp_digits.bundle"),
            ("  volumes:\n", f"  volumes:\n{archive}"),
            ("name: digits\nspec", f"name: {name}\nspec"),
        )

    with tempfile.TemporaryDirectory() as directory, served(directory) as url:
        archive = Path(directory) / "made.tgz"
        with tarfile.open(archive, "w:gz") as tar:
            tar.add(ROOT / "bundles/mlp_digits.bundle", "mlp_digits.bundle")
        sha256 = hashlib.sha256(archive.read_bytes()).hexdigest()
        apply("fetched", "digits", from_archive(f"{url}/made.tgz", "0" * 64, "wrong"))
        failed = condition(state("fetched", "wrong", "Failed", 60), "Failed")
        print(failed["message"])
        assert failed["reason"] == "InvalidInput" and f"has {sha256}" in failed["message"], failed

        # What a server makes of a signature is its own affair: this one only notes who has signed.
        entries = ("AWS_ACCESS_KEY_ID=mine", "AWS_SECRET_ACCESS_KEY=secret", f"AWS_ENDPOINT={url}")
        kubectl("create", "secret", "generic", "store", "-n", "fetched", *[f"--from-literal={e}" for e in entries])
        apply("fetched", "digits", from_archive("s3://store/later.tgz", sha256, "digits", ", credentials: store"))

        def waits():
            training = condition(get("trainingjob", "digits", "fetched"), "Training")
            return training["message"] if "answered 404" in training["message"] else None

        print(wait("the job tells of the missing archive", 60, waits))
        store = Path(directory) / "store"
        store.mkdir()
        archive.rename(store / "later.tgz")
        state("fetched", "digits", "Complete", 150)
        got = [line for line in (STATE / "logs/http.log").read_text().splitlines() if "GET /store/later.tgz" in line]
        assert got and all("X-Amz-Credential=mine%2F" in line for line in got), got
    worst = same(losses(log("fetched", "digits")), local("digits", 200))
    print(f"worst difference to local mode {worst:.1e}")


# For an image that has Perl and no Arrow: it sends a file that was written before, once the head listens.
FEEDER = """
use IO::Socket::UNIX;
open my $rows, "<:raw", "results/digits.arrow" or die "results/digits.arrow: $!";
my $head;
sleep 1 until $head = IO::Socket::UNIX->new(Peer => "feeder.sock");
local $/;
print {$head} scalar <$rows>;
close $head;
sleep;
"""


@scenario(45)
def fed():
    """A program in a container of its own makes the data, and is told of when it cannot: losses are those of its rows."""
    namespace("fed")
    feeder = {"image": "foreshard.dev/foreshard:e2e", "command": ["perl", "-e", FEEDER]}
    by_feeder = replaced(
        ("    uri: digits/digits.csv\n", f"    socket: feeder.sock\n    feeder: {json.dumps(feeder)}\n"),
        ('    columns:\n      x: ["pixel*"]\n', ""),
        ('      # Unquoted, kubectl reads a y as true.\n      "y": [label]\n', ""),
    )
    apply("fed", "digits", lambda m: by_feeder(steps(3)(m)))

    def missed():
        said = condition(get("trainingjob", "digits", "fed"), "Training")["message"]
        return said if "container feeder ends again and again" in said else None

    print(wait("the feeder that finds no rows is told of", 90, missed))
    shutil.copy(ROOT / "e2e/digits.arrow", STATE / "volumes/fed")
    state("fed", "digits", "Complete", 150)
    in_order = replaced(("    uri: digits/digits.csv\n", "    uri: digits/digits.csv\n    shuffle: none\n"))
    worst = same(losses(log("fed", "digits")), local("digits", 3, in_order))
    print(f"worst difference to the same rows read from a file in local mode {worst:.1e}")


@scenario(105)
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


@scenario(75)
def continues():
    """A job begins where the checkpoint of another stands, which stays as it is; one of another model is refused."""
    namespace("continues")
    apply("continues", "digits")
    job = state("continues", "digits", "Complete", 150)
    source = Path(job["status"]["results"]).relative_to("/job").parent

    def beginning_there(every):
        return f"    everySteps: {every}\n", f"    everySteps: {every}\n    source: {source}\n"

    apply("continues", "chargpt", replaced(beginning_there(20)))
    failed = condition(state("continues", "chargpt", "Failed", 90), "Failed")
    print(failed["message"])
    assert failed["reason"] == "InvalidInput" and "spec.checkpoint.source" in failed["message"], failed
    assert "is of model" in failed["message"], failed

    later = replaced(("name: digits\nspec", "name: later\nspec"), beginning_there(50))
    apply("continues", "digits", lambda m: steps(300)(later(m)))
    state("continues", "later", "Complete", 150)
    found = losses(log("continues", "later"))
    assert sorted(found) == list(range(200, 300)), sorted(found)[:5]
    worst = same(losses(log("continues", "digits")) | found, local("digits", 300))
    print(f"went on at step {min(found)}, worst difference to one run of 300 steps in local mode {worst:.1e}")


@anywhere(25)
def delete():
    """Deleted mid-run, nothing is left but the results."""
    namespace("delete")
    apply("delete", "digits", steps(1_000_000))
    state("delete", "digits", "Running", 150)
    kubectl("delete", "trainingjob", "digits", "-n", "delete", "--wait=false")
    kinds = "pods,services,configmaps,secrets,networkpolicies,partitionplans"
    wait("everything of the job is gone", 150, lambda: items(kinds, "delete", "digits") == [])
