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
# (idle seconds before, busy seconds), once plans for slow devices have been compiled.
SCHEDULE = [(5, 40)] + 6 * [(20, 20)]
# So many at a time: what they leave to the worker is a fifth of its core.
COMPETITORS = 4


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


class Run:
    def __init__(self, manifest: str) -> None:
        n = next(n for n in range(1, 100_000) if not Path(f"runs/recut-{n}").exists())
        self.directory = Path(f"runs/recut-{n}")
        self.job = subprocess.Popen([*FORESHARD, "local", "run", manifest, "--run-dir", str(self.directory)])

    def ended(self) -> bool:
        return self.job.poll() is not None

    def wait(self, seconds: float) -> bool:
        """Whether the job ended meanwhile."""
        try:
            self.job.wait(seconds)
            return True
        except subprocess.TimeoutExpired:
            return False

    def steps(self) -> int:
        log = self.directory / "log.jsonl"
        return log.read_bytes().count(b"\n") if log.exists() else 0

    def events(self, kind: str) -> list[dict]:
        path = self.directory / "events.jsonl"
        whole = path.read_text().splitlines(keepends=True) if path.exists() else []
        return [e for e in map(json.loads, (line for line in whole if line.endswith("\n"))) if e["event"] == kind]

    def rehearsed(self) -> None:
        """Waits until no more plans are compiled for later."""
        seen, since = -1, time.monotonic()
        began = since
        while not self.ended() and time.monotonic() - since < 15 and time.monotonic() - began < 120:
            if (now := len(self.events("rehearsal"))) != seen:
                seen, since = now, time.monotonic()
            time.sleep(0.2)


def main() -> int:
    run = Run(sys.argv[1] if len(sys.argv) > 1 else "manifests/recut.yaml")
    burning: list[int] = []
    contentions: list[tuple[int, int]] = []
    try:
        while not run.ended() and run.steps() == 0:
            time.sleep(0.1)
        print("--- it is quiet: plans for slower devices are compiled for later", file=sys.stderr)
        run.rehearsed()
        for idle, busy in SCHEDULE:
            if run.wait(idle):
                break
            pid = json.loads((run.directory / "pids.json").read_text())[VICTIM]
            cores = os.sched_getaffinity(pid)
            print(f"--- competitors run on the core of worker {VICTIM} for {busy} s", file=sys.stderr)
            first = run.steps()
            burning = [burn(cores, busy) for _ in range(COMPETITORS)]
            ended = run.wait(busy)
            stop(burning)
            burning = []
            contentions.append((first, run.steps()))
            if ended:
                break
            print("--- the competitors are gone", file=sys.stderr)
        code = run.job.wait()
    except KeyboardInterrupt:
        code = run.job.wait()
    finally:
        stop(burning)
    tell(run, contentions)
    report = subprocess.run([*FORESHARD, "report", str(run.directory)])
    return code or report.returncode


def tell(run: Run, contentions: list[tuple[int, int]]) -> None:
    """What the plan did about each contention, in steps."""
    moves = [(e["at"], "is foreseen" in e.get("why", "")) for e in run.events("cutover")]
    ends = [(0, 0), *contentions]
    starts = [first for first, _ in contentions[1:]] + [sys.maxsize]
    for (_, before), (first, last), after in zip(ends, contentions, starts):
        said = [f"{first - m} steps before, as foreseen" for m, foreseen in moves if before < m <= first and foreseen]
        said += [f"{m - first} steps after the start" for m, _ in moves if first < m <= last]
        said += [f"{m - last} steps after the end" for m, foreseen in moves if last < m <= after and not foreseen]
        print(f"competitors at steps {first} to {last}: the plan moved {', '.join(said) or 'not'}", file=sys.stderr)
    over = contentions[-1][1] if contentions else 0
    for step in [m for m, foreseen in moves if foreseen and m > over]:
        print(f"at step {step}, after the last of them, the plan moved for what was foreseen", file=sys.stderr)


def stop(children: list[int]) -> None:
    for child in children:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


if __name__ == "__main__":
    sys.exit(main())
