#!/usr/bin/env python3
"""Renders the chart with values of all kinds and looks at what comes out. Needs no cluster, only Helm: e2e/cluster/build helm."""

import subprocess
import sys
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parent.parent
HELM = ROOT / ".foreshard/cluster/bin/helm"


def helm(*values):
    sets = [part for value in values for part in ("--set", value)]
    command = [HELM, "template", "rel", ROOT / "charts/foreshard", "-n", "sys", *sets]
    return subprocess.run(command, text=True, capture_output=True)


def rendered(*values):
    done = helm(*values)
    assert done.returncode == 0, done.stderr
    return {(o["kind"], o["metadata"]["name"]): o for o in yaml.safe_load_all(done.stdout) if o}


def refused(value, says):
    done = helm(value)
    assert done.returncode != 0, f"{value} was let in"
    assert says in done.stderr, f"{says!r} is not in {done.stderr!r}"


def args(objects):
    return objects["Deployment", "rel"]["spec"]["template"]["spec"]["containers"][0]["args"]


def kinds(objects):
    return {kind for kind, _ in objects}


def by_default():
    objects = rendered()
    assert kinds(objects) == {
        "CustomResourceDefinition", "ServiceAccount", "ClusterRole", "ClusterRoleBinding", "Role", "RoleBinding",
        "Deployment", "NetworkPolicy", "PodDisruptionBudget",
    }  # fmt: skip
    assert "--image=foreshard.dev/foreshard:0.1.0" in args(objects)


def image():
    digest = "sha256:" + "0" * 64
    objects = rendered("image.repository=r/f", "image.tag=v2", f"image.digest={digest}")
    assert f"--image=r/f@{digest}" in args(objects)
    container = objects["Deployment", "rel"]["spec"]["template"]["spec"]["containers"][0]
    assert container["image"] == f"r/f@{digest}"
    more = args(rendered("image.plugins.nvidia\\.com/gpu=/cuda.so"))
    assert "--image-plugin=nvidia.com/gpu=/cuda.so" in more
    assert any(a.startswith("--image-plugin=cpu=") for a in more)


def one_namespace():
    objects = rendered("watchNamespace=jobs")
    assert "--watch-namespace=jobs" in args(objects)
    rules = objects["ClusterRole", "rel"]["rules"]
    assert [r["resources"] for r in rules] == [["nodes"]], rules
    assert objects["Role", "rel-jobs"]["metadata"]["namespace"] == "jobs"


def replicas_of_nobody():
    """A field that Helm applies and kubectl scale has changed is a conflict: an upgrade is refused."""
    for values in ([], ["replicas=null"]):
        assert "replicas" not in rendered(*values)["Deployment", "rel"]["spec"], values
    for n in (0, 2):
        assert rendered(f"replicas={n}")["Deployment", "rel"]["spec"]["replicas"] == n


def several_replicas():
    # Who scales by hand may have several.
    assert ("PodDisruptionBudget", "rel") in rendered()
    assert ("PodDisruptionBudget", "rel") in rendered("replicas=2")
    assert "PodDisruptionBudget" not in kinds(rendered("replicas=2", "podDisruptionBudget.enabled=false"))
    assert "PodDisruptionBudget" not in kinds(rendered("replicas=1"))


def monitors():
    assert "PodMonitor" not in kinds(rendered())
    one = rendered("monitoring.kind=PodMonitor", "monitoring.labels.team=a")["PodMonitor", "rel"]
    assert one["metadata"]["labels"]["team"] == "a"
    ports = rendered()["Deployment", "rel"]["spec"]["template"]["spec"]["containers"][0]["ports"]
    assert one["spec"]["podMetricsEndpoints"][0]["port"] in [p["name"] for p in ports]
    objects = rendered("monitoring.kind=ServiceMonitor", "monitoring.interval=5s")
    service, monitor = objects["Service", "rel-metrics"], objects["ServiceMonitor", "rel"]
    assert monitor["spec"]["endpoints"] == [{"port": "health", "path": "/metrics", "interval": "5s"}]
    assert monitor["spec"]["selector"]["matchLabels"].items() <= service["metadata"]["labels"].items()


def switches():
    objects = rendered("crds.install=false", "networkPolicy.enabled=false")
    assert not kinds(objects) & {"CustomResourceDefinition", "NetworkPolicy"}
    for crd in [o for (kind, _), o in rendered().items() if kind == "CustomResourceDefinition"]:
        assert crd["metadata"]["annotations"]["helm.sh/resource-policy"] == "keep"


def wrong_values():
    refused("replica=2", "replica")
    refused("replicas=-1", "minimum")
    refused("image.digest=abc", "image/digest")
    refused("image.plugins.abacus=/a.so", "abacus")
    refused("monitoring.kind=Prometheus", "monitoring/kind")
    refused("monitoring.interval=often", "monitoring/interval")


def plain_install():
    made = subprocess.run([ROOT / "scripts/plain-install.sh"], check=True, text=True, capture_output=True).stdout
    committed = (ROOT / "manifests/install/foreshard.yaml").read_text()
    assert made == committed, "manifests/install is not what the chart makes now; run make manifests"


def main():
    if not HELM.exists():
        sys.exit(f"{HELM.relative_to(ROOT)} is missing; e2e/cluster/build helm makes it")
    for test in (
        by_default, image, one_namespace, replicas_of_nobody, several_replicas, monitors, switches, wrong_values, plain_install,
    ):  # fmt: skip
        test()
        print(f"ok     chart: {test.__name__.replace('_', ' ')}")


if __name__ == "__main__":
    main()
