"""Who reaches a job."""

import contextlib
import json

from kit import SYSTEM, apply, cluster, get, holder, items, kubectl, log, namespace, state, steps, wait
from scenarios import scenario

# Says again and again where it can connect to.
STRANGER = """
use IO::Socket::INET;
$| = 1;
while (1) {
    print "open:", (map { " $_" } grep { IO::Socket::INET->new(PeerAddr => $_, Timeout => 2) } @ARGV), "\\n";
    sleep 1;
}
"""


@contextlib.contextmanager
def enforced():
    """Network policies, which do nothing in this cluster otherwise."""
    cluster("policies", "on")
    try:
        yield
    finally:
        cluster("policies", "off")


def stranger(node, addresses):
    """A pod of the job's own namespace that is none of the job."""
    container = {
        "name": "stranger",
        "image": "foreshard.dev/foreshard:e2e",
        "command": ["perl", "-e", STRANGER, *addresses],
        "securityContext": {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}},
    }
    spec = {
        "nodeName": node,
        "containers": [container],
        "terminationGracePeriodSeconds": 0,
        "securityContext": {"runAsNonRoot": True, "seccompProfile": {"type": "RuntimeDefault"}},
    }
    pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": f"stranger-{node}"}, "spec": spec}
    kubectl("apply", "-n", "strangers", "-f", "-", manifest=json.dumps(pod))


def reached(node):
    """Addresses that a stranger has last reached."""
    said = kubectl("logs", "-n", "strangers", f"stranger-{node}", "--tail=1", check=False).stdout.split()
    return set(said[1:]) if said[:1] == ["open:"] else None


@scenario(90)
def strangers():
    """Where network policies are enforced, the operator and a job's own pods reach its ports, and nobody else does."""
    namespace("strangers")
    nodes = ("node-1", "node-2")
    with enforced():
        apply("strangers", "chargpt", steps(3000))
        # The operator has it from the head, whose workers have found each other.
        state("strangers", "chargpt", "Running", 150)
        at = {p["metadata"]["name"]: p["status"]["podIP"] for p in items("pods", "strangers", "chargpt")}
        shielded = {f"{at['chargpt-0']}:{port}" for port in (7070, 7071, 7072)} | {f"{at['chargpt-1']}:7071"}
        # Its figures are for everybody.
        public = {f"{get('pod', holder(), SYSTEM)['status']['podIP']}:8080"}
        for node in nodes:
            stranger(node, sorted(shielded | public))
        for node in nodes:
            wait(f"the stranger on {node} reaches the operator alone", 60, lambda: reached(node) == public)
        done = len(log("strangers", "chargpt"))
        wait("10 more steps", 60, lambda: len(log("strangers", "chargpt")) >= done + 10)
        found = {node: reached(node) for node in nodes}
        assert all(addresses == public for addresses in found.values()), found
    # It was the policy that kept them out.
    for node in nodes:
        wait(f"the stranger on {node} reaches the job", 60, lambda: reached(node) == shielded | public)
    print(f"{len(shielded)} ports of a job were closed to a pod of its namespace, on its node or on another, and are open without policies")
