"""Jobs that cannot run: refused, or told what is missing."""

import contextlib
import json

from kit import apply, condition, get, items, kubectl, namespace, replaced, state, uids, wait
from scenarios import anywhere, scenario


@anywhere(5)
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


@scenario(50)
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


@contextlib.contextmanager
def newer_definition():
    """The definition of jobs as a later version may have it: a field that all jobs get, and one more mode."""
    root = "/spec/versions/0/schema/openAPIV3Schema/properties/spec/properties"
    modes = f"{root}/adaptation/properties/mode/enum"

    def patch(*operations):
        kubectl("patch", "crd", "trainingjobs.foreshard.dev", "--type=json", "-p", json.dumps(operations))

    spec = get("crd", "trainingjobs.foreshard.dev", "default")["spec"]["versions"][0]["schema"]["openAPIV3Schema"]
    n = len(spec["properties"]["spec"]["properties"]["adaptation"]["properties"]["mode"]["enum"])
    patch(
        {"op": "add", "path": f"{root}/telemetry", "value": {"type": "string", "default": "all"}},
        {"op": "add", "path": f"{modes}/-", "value": "Turbo"},
    )
    try:
        yield
    finally:
        patch({"op": "remove", "path": f"{root}/telemetry"}, {"op": "remove", "path": f"{modes}/{n}"})


@scenario(60)
def newer():
    """Jobs of a definition newer than the operator: unknown fields hinder nothing, and what it cannot read it says so."""
    namespace("newer")
    turbo = replaced(("name: digits\nspec", "name: turbo\nspec"))
    with newer_definition():

        def applied():
            return apply("newer", "digits", lambda m: turbo(m) + "  adaptation: {mode: Turbo}\n", check=False).returncode == 0

        wait("the newer definition", 30, applied)
        said = condition(state("newer", "turbo", "Unreadable", 30), "Training")["message"]
        print(said)
        assert "spec.adaptation.mode: \"Turbo\", must be one of Auto" in said, said
        apply("newer", "digits")
        job = state("newer", "digits", "Complete", 150)
        assert job["spec"]["telemetry"] == "all", job["spec"]
        events = kubectl("get", "events.events.k8s.io", "-n", "newer", "-o", "jsonpath={.items[*].reason}")
        assert "Unreadable" in events, events
        assert uids("newer", "turbo") == {}
        kubectl("patch", "trainingjob", "turbo", "-n", "newer", "--type=merge", "-p", '{"spec": {"adaptation": {"mode": "Off"}}}')
        state("newer", "turbo", "Complete", 150)
