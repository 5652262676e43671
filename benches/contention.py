"""Throughput while other work takes part of each worker's core, as recorded on real machines.

Two workers train the sample GPT. A recorded CPU usage of two applications, a day of it in `--day` seconds, limits what
each worker gets of its core: through cgroup quotas where they can be made, else through a competitor on the same core.
Four arms see the same days, one after another, in every second round in turned order:

    static     the plan of the start stays
    threshold  moves answer what has happened
    forecast   moves answer what is foreseen
    oracle     knows the recording, has measured every plan on short cores and what a move costs, and asks for the plans
               that are best with all moves counted, each just in time

The machine itself is faster at some times than at others: what a loop of Python reaches on both cores before and after an
arm says by how much, and throughput is also given in units of that.

    benches/contention.py [--arms static threshold forecast oracle] [--day 60] [--days 4] [--rounds 1]
                          [--binary target/release/foreshard]
"""

import argparse
import json
import os
import signal
import socket
import statistics
import subprocess
import tempfile
import threading
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
ARMS = ["static", "threshold", "forecast", "oracle"]
# At most so much of a core is taken away.
DEPTH = 0.6
# Shares of all work that the oracle's plans give worker 1's core: finer ones gain less than a move costs.
SHARES = [0.30, 0.36, 0.42, 0.46, 0.50, 0.54, 0.58, 0.64, 0.70]
# What of its core the oracle leaves a worker to see what becomes of a plan, and both to see what a move costs.
SHORT, SHORTENED = 0.5, 0.7
PERIOD_US = 10_000


def recording() -> list[tuple[float, float]]:
    lines = (ROOT / "benches/data/crane_cpu.csv").read_text().splitlines()
    rows = [line for line in lines if not line.startswith("#")][1:]
    return [tuple(1 - DEPTH * float(x) for x in row.split(",")) for row in rows]


class Trace:
    """What each worker gets of its core, by seconds since the recording began to play."""

    def __init__(self, day: float, days: int) -> None:
        self.values = recording()[: 96 * days]
        self.step = day / 96
        self.seconds = day * days

    def at(self, t: float) -> tuple[float, float]:
        return self.values[min(max(int(t / self.step), 0), len(self.values) - 1)]

    def bound(self) -> tuple[float, float]:
        """Throughput, in units of the undisturbed one, of an even split and of the best split at every moment."""
        n = len(self.values)
        return sum(min(v) for v in self.values) / n, sum(sum(v) / 2 for v in self.values) / n


class Quota:
    """Limits a worker by a cgroup of the first or of the second version."""

    def __init__(self, name: str) -> None:
        v1 = Path("/sys/fs/cgroup/cpu")
        self.v1 = (v1 / "cpu.cfs_quota_us").exists()
        self.group = (v1 if self.v1 else Path("/sys/fs/cgroup")) / f"foreshard-{os.getpid()}-{name}"
        self.group.mkdir()
        try:
            if self.v1:
                self.write("cpu.cfs_period_us", PERIOD_US)
            self.limit(1.0)
        except OSError:
            self.close()
            raise

    def write(self, file: str, value: object) -> None:
        (self.group / file).write_text(str(value))

    def limit(self, share: float) -> None:
        quota = int(share * PERIOD_US) if share < 1 else None
        if self.v1:
            self.write("cpu.cfs_quota_us", quota or -1)
        else:
            self.write("cpu.max", f"{quota or 'max'} {PERIOD_US}")

    def take(self, pid: int) -> None:
        self.write("cgroup.procs", pid)

    def close(self) -> None:
        for _ in range(50):
            try:
                return self.group.rmdir()
            except OSError:
                time.sleep(0.1)


class Competitor:
    """Limits a worker by a process on its core that is busy for the rest of every 20 ms."""

    CODE = """
import os, sys, time
os.sched_setaffinity(0, {int(sys.argv[1])})
os.nice(-10) if os.geteuid() == 0 else None
share = [0.0]
import threading
threading.Thread(target=lambda: [share.__setitem__(0, float(line)) for line in sys.stdin] and os._exit(0), daemon=True).start()
while True:
    end = time.monotonic() + 0.02 * share[0]
    while time.monotonic() < end: pass
    time.sleep(0.02 * (1 - share[0]))
"""

    def __init__(self, core: int) -> None:
        self.process = subprocess.Popen(["python3", "-c", self.CODE, str(core)], stdin=subprocess.PIPE, text=True)

    def take(self, pid: int) -> None:
        pass

    def limit(self, share: float) -> None:
        self.process.stdin.write(f"{1 - share}\n")
        self.process.stdin.flush()

    def close(self) -> None:
        self.process.kill()
        self.process.wait()


def limits() -> list:
    made = []
    try:
        for name in ("0", "1"):
            made.append(Quota(name))
        return made
    except OSError as e:
        for quota in made:
            quota.close()
        print(f"  no cgroup quotas here ({e}): competitors on the workers' cores instead")
        return [Competitor(core) for core in sorted(os.sched_getaffinity(0))[:2]]


def job(arm: str, scratch: Path, day: float) -> Path:
    adaptation = {
        "mode": "Auto" if arm in ("threshold", "forecast") else "Off",
        "forecast": arm == "forecast",
        # As far in proportion as hours are for a day.
        "horizon": day,
        "dwell": 1,
        "cooldown": 2,
        "threshold": 0.1,
        "minGain": 0.05,
        "budget": {"share": 0.2},
    }
    path = scratch / f"{arm}.yaml"
    path.write_text(json.dumps({
        "apiVersion": "foreshard.dev/v1alpha1",
        "kind": "TrainingJob",
        "metadata": {"name": f"contention-{arm}"},
        "spec": {
            "bundle": str(ROOT / "bundles/char_gpt.bundle"),
            "data": {"uri": str(ROOT / "examples/data/tinyshakespeare.txt")},
            "steps": 1_000_000,
            "parallelism": {"shards": 2},
            "resources": {"cores": 1},
            "checkpoint": {"everySteps": 0},
            "adaptation": adaptation,
        },
    }))  # fmt: skip
    return path


class Run:
    def __init__(self, arm: str, scratch: Path, binary: Path, day: float) -> None:
        self.directory = scratch / arm
        line = [binary, "local", "run", "--quiet", "--traced-steps", "0", "--run-dir", self.directory, job(arm, scratch, day)]
        self.process = subprocess.Popen(list(map(str, line)), cwd=ROOT)
        self.binary = binary

    def lines(self, name: str) -> list[dict]:
        path = self.directory / name
        whole = path.read_text().splitlines(keepends=True) if path.exists() else []
        return [json.loads(line) for line in whole if line.endswith("\n")]

    def steps(self) -> int:
        path = self.directory / "log.jsonl"
        return path.read_bytes().count(b"\n") if path.exists() else 0

    def wait_for(self, what, patience: float) -> bool:
        end = time.monotonic() + patience
        while time.monotonic() < end:
            if self.process.poll() is not None:
                raise RuntimeError(f"the job ended with {self.process.returncode}")
            if what():
                return True
            time.sleep(0.1)
        return False

    def ask(self, plan: dict) -> dict:
        with socket.socket(socket.AF_UNIX) as s:
            s.connect(str(self.directory / "control.sock"))
            s.sendall(json.dumps({"request": "recut", "plan": plan}).encode() + b"\n")
            return json.loads(s.makefile().readline())

    def stop(self) -> None:
        self.process.send_signal(signal.SIGINT)
        try:
            self.process.wait(30)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


class Oracle:
    """Plans by the share of worker 1's core in both, what was measured of them, and when they are wanted."""

    def __init__(self, run: Run, trace: Trace, limits: list, scratch: Path) -> None:
        self.run, self.trace, self.limits, self.current = run, trace, limits, SHARES.index(0.5)
        self.plans: list[dict] = []
        first = json.loads((run.directory / "plan.json").read_text())
        for share in SHARES:
            speeds = (min(1, (1 - share) / share), min(1, share / (1 - share)))
            path = scratch / "plan.json"
            line = [run.binary, "plan", ROOT / "bundles/char_gpt.bundle", "--devices",
                    ",".join(f"cpu:speed={s:.3f}" for s in speeds), "-o", path]  # fmt: skip
            subprocess.run(list(map(str, line)), cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
            self.plans.append(first if share == 0.5 else json.loads(path.read_text()))

    def step_seconds(self, *shares: float) -> float:
        """Of the plan in force, while the workers have these shares of their cores."""
        for limit, share in zip(self.limits, shares):
            limit.limit(share)
        time.sleep(0.4)
        first = self.run.steps()
        time.sleep(2.5)
        return statistics.mean(line["interval_s"] for line in self.run.lines("log.jsonl")[first:])

    def rehearse(self) -> None:
        """Every plan twice: its executables are on disk then, and its steps and the moves measured."""
        order = [i for i in range(len(SHARES)) if i != self.current] + [self.current]
        self.measured, shortened = {}, {}
        for i in order:
            self.move(i)
            self.measured[i] = self.step_seconds(1, 1), self.step_seconds(SHORT, 1), self.step_seconds(1, SHORT)
            shortened[i] = self.step_seconds(SHORTENED, SHORTENED)
            self.step_seconds(1, 1)
        for limit in self.limits:
            limit.limit(SHORTENED)
        lost, took = [], []
        for i in order:
            before, first, began = self.current, self.run.steps(), time.monotonic()
            self.move(i)
            took.append(time.monotonic() - began)
            time.sleep(0.5)
            usual = (shortened[before] + shortened[i]) / 2
            lost.append(sum(line["interval_s"] - usual for line in self.run.lines("log.jsonl")[first:]))
        for limit in self.limits:
            limit.limit(1.0)
        self.move_costs, self.ahead = max(0.0, statistics.mean(lost)), statistics.mean(took)
        print(f"  the oracle measured that a move takes {self.ahead:.2f} s and costs {self.move_costs:.2f} s")
        self.schedule = self.scheduled()

    def rate(self, plan: int, a: float, b: float) -> float:
        """Steps per second of a plan: as undisturbed, or as fast as the worker allows whose core is short."""
        undisturbed, first, second = self.measured[plan]
        return 1 / max(undisturbed, first * SHORT / a, second * SHORT / b)

    def scheduled(self) -> list[int]:
        """The plans that train most over the whole recording, moves counted: by dynamic programming from its end."""
        plans = range(len(SHARES))
        move = self.move_costs / self.trace.step
        to_come, choices = [0.0] * len(SHARES), []
        for shares in reversed(self.trace.values):
            # What comes of each plan in force before: it stays, or another one costs a part of its own time.
            rates = [self.rate(j, *shares) for j in plans]
            value = [[(rates[j] * (1 if j == i else 1 - move) + to_come[j], j == i, j) for j in plans] for i in plans]
            best = [max(v) for v in value]
            to_come = [v for v, _, _ in best]
            choices.append([j for _, _, j in best])
        chosen, out = SHARES.index(0.5), []
        for choice in reversed(choices):
            chosen = choice[chosen]
            out.append(chosen)
        gain = to_come[SHARES.index(0.5)] / sum(self.rate(SHARES.index(0.5), *v) for v in self.trace.values)
        moves = sum(a != b for a, b in zip([SHARES.index(0.5), *out], out))
        print(f"  by what it measured, the oracle's {moves} moves bring {gain:.3f} of the static plan", flush=True)
        return out

    def best(self, t: float) -> int:
        return self.schedule[min(max(int(t / self.trace.step), 0), len(self.schedule) - 1)]

    def move(self, to: int) -> None:
        if to == self.current:
            return
        answer = self.run.ask(self.plans[to])
        if "Ok" in answer:
            self.current = to
        else:
            print(f"  the oracle was refused: {answer}")

    def play(self, began: float) -> None:
        while (t := time.monotonic() - began) < self.trace.seconds:
            self.move(self.best(t + self.ahead))
            time.sleep(0.1)


LOOP = """
import os, sys, time
os.sched_setaffinity(0, {int(sys.argv[1])})
end, n = time.monotonic() + 2, 0
while time.monotonic() < end:
    sum(i * i for i in range(2000))
    n += 1
print(n)
"""


def machine() -> float:
    """Loops in two seconds on the cores of the workers, both at once."""
    cores = sorted(os.sched_getaffinity(0))[:2]
    loops = [subprocess.Popen(["python3", "-c", LOOP, str(core)], stdout=subprocess.PIPE, text=True) for core in cores]
    return statistics.mean(int(loop.communicate()[0]) for loop in loops)


def arm(name: str, trace: Trace, day: float, binary: Path, scratch: Path) -> dict:
    before = machine()
    run, limit = Run(name, scratch, binary, day), limits()
    try:
        run.wait_for(lambda: run.steps() >= 30, 120)
        for worker, pid in json.loads((run.directory / "pids.json").read_text()).items():
            limit[int(worker)].take(pid)
        oracle = None
        if name == "oracle":
            oracle = Oracle(run, trace, limit, scratch)
            oracle.rehearse()
            time.sleep(1)
        elif name != "static":
            # Plans for slow devices are compiled in quiet times; in earnest these are most of all times.
            seen = [0, time.monotonic()]

            def quiet() -> bool:
                begun, ended = (
                    sum(e["event"] == name for e in run.lines("events.jsonl")) for name in ("rehearsing", "rehearsal")
                )
                if begun + ended > seen[0] or begun > ended:
                    seen[:] = [begun + ended, time.monotonic()]
                return time.monotonic() - seen[1] > (10 if begun else 15)

            run.wait_for(quiet, 600)
        undisturbed = run.lines("log.jsonl")[-30:]
        cutovers = lambda: sum(e["event"] == "cutover" for e in run.lines("events.jsonl"))
        began, first, moves = time.monotonic(), run.steps(), cutovers()
        if oracle:
            threading.Thread(target=oracle.play, args=(began,), daemon=True).start()
        by_day = [first]
        while (t := time.monotonic() - began) < trace.seconds:
            for l, share in zip(limit, trace.at(t)):
                l.limit(share)
            if t // day + 1 > len(by_day):
                by_day.append(run.steps())
            if run.process.poll() is not None:
                raise RuntimeError(f"the job ended with {run.process.returncode}")
            time.sleep(0.05)
        seconds, steps = time.monotonic() - began, run.steps()
        by_day.append(steps)
        for l in limit:
            l.limit(1.0)
        run.stop()
        return {
            "throughput": (steps - first) / seconds,
            "machine": (before + machine()) / 2,
            "days": [(b - a) / day for a, b in zip(by_day, by_day[1:])],
            "moves": cutovers() - moves,
            "undisturbed": len(undisturbed) / sum(line["interval_s"] for line in undisturbed),
        }
    finally:
        run.stop()
        for l in limit:
            l.close()


def contention(
    binary: Path, arms: list[str] = ARMS, day: float = 60, days: int = 4, rounds: int = 1, keep: Path | None = None
) -> dict[str, list[dict]]:
    trace = Trace(day, days)
    even, best = trace.bound()
    print(f"\ncontention: two workers, {days} recorded days of {day:.0f} s; of an undisturbed job an even split can do "
          f"{even:.3f}, the best at each moment {best:.3f}, ratio {even / best:.3f}", flush=True)  # fmt: skip
    done: dict[str, list[dict]] = {name: [] for name in arms}
    usual = None
    for n in range(rounds):
        for name in arms if n % 2 == 0 else reversed(arms):
            with tempfile.TemporaryDirectory() as scratch:
                place = keep / str(len(done[name])) if keep else Path(scratch)
                place.mkdir(parents=True, exist_ok=True)
                r = arm(name, trace, day, binary, place)
            usual = usual or r["machine"]
            done[name].append(r)
            print(f"  {name:<10} {r['throughput']:.2f} steps/s, {r['moves']} moves, undisturbed {r['undisturbed']:.2f} steps/s, "
                  f"the machine {r['machine'] / usual:.3f}; by day {' '.join(f'{d:.2f}' for d in r['days'])}", flush=True)  # fmt: skip
    compare(done)
    return done


def compare(done: dict[str, list[dict]]) -> None:
    """Ratios of medians over the rounds."""
    measures = [
        ("all days", lambda r: r["throughput"]),
        ("all days, by the machine's speed", lambda r: r["throughput"] / r["machine"]),
        ("the last two", lambda r: statistics.mean(r["days"][-2:])),
    ]
    for what, of in measures:
        value = {name: statistics.median(map(of, runs)) for name, runs in done.items() if runs}
        for name in value:
            ratios = [f"{value[name] / value[o]:.3f} x {o}" for o in ("static", "threshold", "oracle") if o in value and o != name]
            if name != "oracle" and ratios:
                target = " (target >= 1 x threshold, >= 0.90 x oracle)" if name == "forecast" else ""
                print(f"  {name}, {what}: {', '.join(ratios)}{target}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arms", nargs="*", choices=ARMS, default=ARMS)
    parser.add_argument("--day", type=float, default=60)
    parser.add_argument("--days", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--binary", type=Path, default=ROOT / "target/release/foreshard")
    parser.add_argument("--keep", type=Path, help="directory for the runs, instead of a temporary one")
    parser.add_argument("--results", type=Path, help="a file that collects runs over several calls")
    args = parser.parse_args()
    done = contention(args.binary.resolve(), args.arms, args.day, args.days, args.rounds, args.keep and args.keep.resolve())
    if args.results:
        all_of = json.loads(args.results.read_text()) if args.results.exists() else {}
        for name, runs in done.items():
            all_of.setdefault(name, []).extend(runs)
        args.results.write_text(json.dumps(all_of, indent=1))
        print("with earlier results")
        compare(all_of)


if __name__ == "__main__":
    main()
