#!/usr/bin/env python3
"""Trains a GPT in two workers while real processes compete for the core of one of them.

First once, as a surprise; then again and again, as something that can be foreseen. Everything ends with the job.
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

FORESHARD = ["target/debug/foreshard"]
VICTIM = "1"
# (idle seconds before, busy seconds), after the first step.
SCHEDULE = [(25, 60), (30, 25), (25, 25), (25, 25), (25, 25), (25, 25), (25, 25)]
# So many at a time: what they leave to the worker is a third of its core.
COMPETITORS = 2


def burn(cores: set[int], seconds: float) -> int:
    """Starts a process that keeps one of `cores` busy for so long; returns its id."""
    child = os.fork()
    if child == 0:
        os.sched_setaffinity(0, cores)
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            pass
        os._exit(0)
    return child


def main() -> int:
    manifest = sys.argv[1] if len(sys.argv) > 1 else "manifests/recut.yaml"
    n = next(n for n in range(1, 100_000) if not Path(f"runs/recut-{n}").exists())
    run = Path(f"runs/recut-{n}")
    job = subprocess.Popen([*FORESHARD, "local", "run", manifest, "--run-dir", str(run)])
    burning: list[int] = []
    try:
        while job.poll() is None and not (run / "log.jsonl").exists():
            time.sleep(0.1)
        while job.poll() is None and not (run / "log.jsonl").read_text():
            time.sleep(0.1)
        for idle, busy in SCHEDULE:
            if wait(job, idle):
                break
            pid = json.loads((run / "pids.json").read_text())[VICTIM]
            cores = os.sched_getaffinity(pid)
            print(f"--- competitors run on the core of worker {VICTIM} for {busy} s", file=sys.stderr)
            burning = [burn(cores, busy) for _ in range(COMPETITORS)]
            ended = wait(job, busy)
            stop(burning)
            burning = []
            if ended:
                break
            print("--- the competitors are gone", file=sys.stderr)
        code = job.wait()
    except KeyboardInterrupt:
        code = job.wait()
    finally:
        stop(burning)
    report = subprocess.run([*FORESHARD, "report", str(run)])
    return code or report.returncode


def wait(job: subprocess.Popen, seconds: float) -> bool:
    """Whether the job ended meanwhile."""
    try:
        job.wait(seconds)
        return True
    except subprocess.TimeoutExpired:
        return False


def stop(children: list[int]) -> None:
    for child in children:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


if __name__ == "__main__":
    sys.exit(main())
