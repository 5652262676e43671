#!/usr/bin/env python3
"""Trains a GPT in two workers while real processes compete for the core of one of them.

First once, as a surprise; then again and again, as something that can be foreseen. A while after the last time the job
is stopped, and all ends with it.
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
SCHEDULE = [(5, 40)] + 8 * [(20, 20)]
# So many at a time: what they leave to the worker is a fifth of its core.
COMPETITORS = 4
# After the last of them: so long, and the demo is over, however far the job has come.
REST = 40


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

    def share(self, revision: int) -> float:
        """Of the ops of a plan, those of the victim."""
        plan = json.loads((self.directory / "plans" / f"plan-{revision}.json").read_text())
        shards = [op["shard"] for op in next(iter(plan["grads"].values())) if "shard" in op]
        return shards.count(int(VICTIM)) / len(shards)

    def rehearsed(self) -> None:
        """Waits until no more plans are compiled for later. That is done in spells, of up to half a minute on a slow core."""
        seen, since = -1, time.monotonic()
        began = since
        while not self.ended() and time.monotonic() - since < 40 and time.monotonic() - began < 240:
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
        if run.wait(REST):
            code = run.job.returncode
        else:
            run.job.send_signal(signal.SIGINT)
            code = run.job.wait()
            if code == 128 + signal.SIGINT:  # as asked
                code = 0
    except KeyboardInterrupt:
        code = run.job.wait()
    finally:
        stop(burning)
    tell(run, contentions)
    report = subprocess.run([*FORESHARD, "report", str(run.directory)])
    return code or report.returncode


def tell(run: Run, contentions: list[tuple[int, int]]) -> None:
    """What the plan did about each contention, in steps: when the victim got less to do, and when more again."""
    now = run.share(1)
    away, back = [], []
    for move in run.events("cutover"):
        before, now = now, run.share(move["revision"])
        (away if now < before else back).append(move["at"])
    starts = [first for first, _ in contentions[1:]] + [sys.maxsize]
    over = 0
    for (first, last), after in zip(contentions, starts):
        said = [f"away {first - m} steps before it" for m in away if over < m <= first][-1:]
        said += [f"away {m - first} steps after its start" for m in away if first < m <= last]
        said += [f"back {last - m} steps before its end" for m in back if first < m <= last]
        said += [f"back {m - last} steps after its end" for m in back if last < m <= after]
        print(f"competitors at steps {first} to {last}: work moved {', '.join(said) or 'not'}", file=sys.stderr)
        over = last
    for step in (m for m in away if m > over):
        print(f"at step {step}, after the last of them, work moved away for one that did not come", file=sys.stderr)


def stop(children: list[int]) -> None:
    for child in children:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


if __name__ == "__main__":
    sys.exit(main())
