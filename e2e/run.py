#!/usr/bin/env python3
"""Scenarios on a real cluster: brings it up, installs the chart, runs the samples, and takes it down.

    e2e/run.py                     all scenarios
    e2e/run.py completes suspend   these
    e2e/run.py --keep completes    and leaves the cluster up
    e2e/run.py --within=600        those that fit into so many seconds, in their order; the others are named
    e2e/run.py --existing=IMAGE    on the cluster that KUBECONFIG names, with an image it can fetch: what needs no access
                                   to nodes; its default storage class has to give volumes to several nodes at once

A scenario that fails is told with its reason and tried once more. The last line counts: N passed, N failed.
Needs root, Go and the packages that e2e/README.md lists.
"""

import argparse
import signal
import sys
import time

from kit import NAMESPACES, SITE, cluster, explain, forget, install, kubectl
from scenarios import ANYWHERE, SCENARIOS

# Kept back for taking the cluster down.
DOWN = 20


class OutOfTime(BaseException):
    """Comes in the middle of anything, and is no failure."""


def attempt(name):
    """Runs a scenario; what went wrong, in words."""
    try:
        SCENARIOS[name].run()
    except Exception as e:  # noqa: BLE001: whatever it is, it is told, and the others still run
        return str(e) if isinstance(e, (RuntimeError, AssertionError)) else f"{type(e).__name__}: {e}"
    return None


def with_retry(name, left, results):
    """Runs a scenario, if need be twice, and notes whether it has passed. `left`: seconds until the end."""
    first = None
    for note in ("", " at the second try"):
        start = time.monotonic()
        why = attempt(name)
        results[name] = why is None
        if why is None:
            seconds = f"({time.monotonic() - start:.0f} s)"
            print(f"ok     {name}{note} {seconds}" + (f"; at the first: {first}" if first else ""), flush=True)
            return
        print(f"FAILED {name}{note}: {why}", flush=True)
        explain()
        if first:
            return
        if left() < SCENARIOS[name].seconds:
            print(f"       {name}: no time for a second try", flush=True)
            return
        first = why
        forget()
        install()


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
    to_do = [n for n in args.scenarios or SCENARIOS if not SITE.existing or n in ANYWHERE]
    began = time.monotonic()

    def left():
        return args.within - DOWN - (time.monotonic() - began) if args.within else float("inf")

    def stop(*_):
        raise OutOfTime

    results = {}
    # What waits in a terminal or a pipe ends as well: the cluster is taken down all the same.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("told to stop"))
    signal.signal(signal.SIGALRM, stop)
    try:
        if args.within:
            signal.alarm(max(1, args.within - DOWN))
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
    n_passed = sum(results.values())
    n_failed = len(results) - n_passed
    not_run = [n for n in to_do if n not in results]
    if not_run:
        print(f"not run, for want of time: {', '.join(not_run)}")
    rest = f", {len(not_run)} not run" if not_run else ""
    print(f"{time.monotonic() - began:.0f} s\n{n_passed} passed, {n_failed} failed{rest}")
    sys.exit(1 if n_failed else 0)


if __name__ == "__main__":
    main()
