"""Jobs that cannot run: refused, or told what is missing."""

from kit import apply, condition, items, kubectl, namespace, replaced, state
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
