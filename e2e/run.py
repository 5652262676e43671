#!/usr/bin/env python3
"""Scenarios on a real cluster: brings it up, installs the chart, runs the samples, and takes it down.

    e2e/run.py                     all scenarios
    e2e/run.py completes suspend   these
    e2e/run.py --keep completes    and leaves the cluster up
    e2e/run.py --within=600        those that fit into so many seconds, in their order; the others are named
    e2e/run.py --existing=IMAGE    on the cluster that KUBECONFIG names, with an image it can fetch: what needs no access
                                   to nodes; its default storage class has to give volumes to several nodes at once

A scenario that fails, or does not end, is told with its reason and tried once more; it has failed if it does so again.
The last line counts: N passed, N failed.
Needs root, Go and the packages that e2e/README.md lists.
"""

import argparse
import contextlib
import math
import signal
import sys
import time

from kit import NAMESPACES, SITE, cluster, explain, forget, install, kubectl
from scenarios import ANYWHERE, FIRST, SCENARIOS

# Kept back for taking the cluster down.
DOWN = 20


class OutOfTime(BaseException):
    """Comes in the middle of anything, and is no failure."""


def longest(name):
    """Seconds after which a scenario hangs: far more than it takes on a busy machine."""
    return 300 + 4 * SCENARIOS[name].seconds


def attempt(name, left, again):
    """Runs a scenario, `again` on a tidied cluster; what went wrong, in words. `left`: seconds until the end."""

    def stop(*_):
        if left() < 1:
            raise OutOfTime
        raise RuntimeError(f"it has not ended after {longest(name)} s")

    signal.signal(signal.SIGALRM, stop)
    signal.alarm(max(1, int(min(longest(name), left()))))
    try:
        if again:
            forget()
            install()
        SCENARIOS[name].run()
    except Exception as e:  # noqa: BLE001: whatever it is, it is told, and the others still run
        return str(e) if isinstance(e, (RuntimeError, AssertionError)) else f"{type(e).__name__}: {e}"
    finally:
        limit(left)
    return None


def limit(left):
    """From now on, `OutOfTime` comes when no time is left."""

    def stop(*_):
        raise OutOfTime

    signal.signal(signal.SIGALRM, stop)
    signal.alarm(0 if left() == math.inf else max(1, int(left())))


def with_retry(name, left, results):
    """Runs a scenario, if need be twice, and notes what came of it."""
    first = None
    for note in ("", " at the second try"):
        start = time.monotonic()
        why = attempt(name, left, again=first is not None)
        if why is None:
            results[name] = "passed"
            seconds = f"({time.monotonic() - start:.0f} s)"
            print(f"ok     {name}{note} {seconds}" + (f"; at the first: {first}" if first else ""), flush=True)
            return
        results[name] = "failed" if first else "undecided"
        print(f"FAILED {name}{note}: {why}", flush=True)
        with contextlib.suppress(RuntimeError):
            explain()
        if first:
            return
        if left() < SCENARIOS[name].seconds:
            print(f"       {name}: no time for a second try", flush=True)
            return
        first = why


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("scenarios", nargs="*", metavar="SCENARIO", help=", ".join(SCENARIOS))
    parser.add_argument("--keep", action="store_true", help="leave the cluster up")
    parser.add_argument("--within", type=int, metavar="SECONDS", help="run what fits into this time")
    parser.add_argument("--existing", metavar="IMAGE", help="use the cluster that KUBECONFIG names")
    args = parser.parse_args()
    unknown = [a for a in args.scenarios if a not in SCENARIOS]
    if unknown:
        parser.error(f"no scenario {unknown[0]!r}; there are {', '.join(SCENARIOS)}")
    SITE.existing = args.existing
    to_do = [n for n in args.scenarios or sorted(SCENARIOS, key=lambda n: n not in FIRST) if not SITE.existing or n in ANYWHERE]
    began = time.monotonic()

    def left():
        return args.within - DOWN - (time.monotonic() - began) if args.within else math.inf

    results = {}
    # What waits in a terminal or a pipe ends as well: the cluster is taken down all the same.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("told to stop"))
    try:
        limit(left)
        if not SITE.existing:
            cluster("up")
        install()
        for name in to_do:
            if left() >= SCENARIOS[name].seconds:
                with_retry(name, left, results)
                for used in NAMESPACES:
                    kubectl("delete", "trainingjobs", "--all", "-n", used, "--wait=false", check=False)
    except OutOfTime:
        print(f"out of time after {time.monotonic() - began:.0f} s", flush=True)
    finally:
        signal.alarm(0)
        if SITE.existing:
            kubectl("delete", "namespace", "--ignore-not-found", "--wait=false", *NAMESPACES, check=False)
        elif not args.keep:
            cluster("down")
    of = {how: [n for n in to_do if results.get(n, "not run") == how] for how in ("passed", "failed", "undecided", "not run")}
    for how in ("undecided", "not run"):
        if of[how]:
            print(f"{how}, for want of time: {', '.join(of[how])}")
    rest = "".join(f", {len(of[how])} {how}" for how in ("undecided", "not run") if of[how])
    print(f"{time.monotonic() - began:.0f} s\n{len(of['passed'])} passed, {len(of['failed'])} failed{rest}")
    sys.exit(1 if of["failed"] else 0)


if __name__ == "__main__":
    main()
