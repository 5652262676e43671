"""The chart over its life, and the operator with many jobs."""

import re
import shutil
import subprocess
import tempfile
import time
from pathlib import Path

from kit import (
    ROOT,
    SYSTEM,
    apply,
    condition,
    figures,
    get,
    helm,
    install,
    items,
    kubectl,
    log,
    namespace,
    replaced,
    state,
    steps,
    uids,
    wait,
)
from scenarios import anywhere, scenario


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
    return helm("package", old, "-d", directory).strip().rsplit(" ", 1)[-1]


@scenario(90)
def upgrade():
    """The chart is upgraded mid-run from an earlier version that was scaled: definitions follow, training goes on."""
    helm("uninstall", "foreshard", "-n", SYSTEM, "--wait")
    kubectl("delete", "crd", "trainingjobs.foreshard.dev")
    with tempfile.TemporaryDirectory() as directory:
        install(chart=chart("0.0.9", directory, "throughput"))
    namespace("upgrade")
    apply("upgrade", "chargpt", steps(200))
    wait("10 steps", 150, lambda: len(log("upgrade", "chargpt")) >= 10)
    before = uids("upgrade", "chargpt")
    assert "throughput" not in get("trainingjob", "chargpt", "upgrade")["status"]
    # Helm refuses to take a field that somebody else has set.
    kubectl("scale", "deployment", "foreshard", "-n", SYSTEM, "--replicas=2")
    install("--set", "log=debug")
    assert get("deployment", "foreshard", SYSTEM)["spec"]["replicas"] == 2
    wait("the new field", 60, lambda: get("trainingjob", "chargpt", "upgrade")["status"].get("throughput"))
    done = len(log("upgrade", "chargpt"))
    wait("10 more steps", 60, lambda: len(log("upgrade", "chargpt")) >= done + 10)
    assert uids("upgrade", "chargpt") == before, "pods were made anew"
    found = [line["step"] for line in log("upgrade", "chargpt")]
    assert found == list(range(len(found))), "steps were lost or repeated"
    print(f"{get('trainingjob', 'chargpt', 'upgrade')['status']['throughput']} after {len(found)} steps")
    install()
    kubectl("scale", "deployment", "foreshard", "-n", SYSTEM, "--replicas=1")


@scenario(80)
def uninstall():
    """Uninstalled, definitions and jobs stay; installed again or upgraded, the operator goes on with them."""
    namespace("uninstall")
    apply("uninstall", "digits")
    before = state("uninstall", "digits", "Complete", 150)
    helm("uninstall", "foreshard", "-n", SYSTEM, "--wait")
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


@anywhere(45)
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
