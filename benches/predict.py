"""Predicted against measured: step time and memory of every shard, for the sample models on one to four workers.

Each model trains for some seconds, and 60 steps, on each number of workers, once undisturbed and once with the CPU time
of every second worker halved by a quota; the plan stays. Over the second half of the run, in windows of half a second,
the time that steps took is compared with what had been predicted before each of them by what had been learned until
then: `predicted` is all of the prediction, `explained` the part that work, overheads, transfers and waiting make up,
without the factor that is learned for the whole step, and `late` what each message was taken to need beyond nominal
figures. `single` is the median error of single steps, which jitter. Memory, beyond what a worker has when its executables
are ready: what the plan said before anything ran, what the compiler says tensors need, and what was seen.

    benches/predict.py [--models char_gpt ...] [--shards 1 2 3 4] [--seconds 8] [--binary target/release/foreshard]
"""

import argparse
import json
import os
import signal
import statistics
import subprocess
import tempfile
import time
from pathlib import Path

from contention import limits

ROOT = Path(__file__).resolve().parent.parent
TEXT = {"uri": str(ROOT / "examples/data/tinyshakespeare.txt")}
DIGITS = {"uri": str(ROOT / "examples/data/digits.csv"), "columns": {"x": ["pixel*"], "y": ["label"]}}
MODELS = {"char_gpt": TEXT, "scan_gpt": TEXT, "convnet_digits": DIGITS, "mlp_digits": DIGITS, "torch_mlp": DIGITS}
SLOWED = 0.5
WINDOW = 0.5
STEPS = 60
MIB = 2**20


def job(model: str, path: Path) -> Path:
    path.write_text(json.dumps({
        "apiVersion": "foreshard.dev/v1alpha1",
        "kind": "TrainingJob",
        "metadata": {"name": "predict"},
        "spec": {
            "bundle": str(ROOT / f"bundles/{model}.bundle"),
            "data": MODELS[model],
            "steps": 1_000_000,
            "checkpoint": {"everySteps": 0},
            "adaptation": {"mode": "Off"},
        },
    }))  # fmt: skip
    return path


def train(model: str, shards: int, seconds: float, binary: Path, run: Path, uneven: bool) -> None:
    """Runs a job for some seconds; its run directory then holds what was predicted and what was seen."""
    command = [binary, "local", "run", job(model, run.with_suffix(".yaml")), "--shards", shards, "--quiet"]
    command += ["--traced-steps", 0, "--run-dir", run]
    log, text = run / "log.jsonl", run.with_suffix(".log")
    with open(text, "w") as said:
        process = subprocess.Popen([str(c) for c in command], cwd=ROOT, stdout=said, stderr=said)
    slow = limits() if uneven else []
    try:
        deadline = time.monotonic() + 300
        # From the first step on, so that nothing is slowed while it compiles.
        while process.poll() is None and time.monotonic() < deadline and not (log.exists() and log.stat().st_size > 0):
            time.sleep(0.02)
        if process.poll() is None:
            pids = json.loads((run / "pids.json").read_text())
            for worker, limit in zip(range(1, shards, 2), slow):
                limit.take(pids[str(worker)])
                limit.limit(SLOWED)
            enough = time.monotonic() + seconds
            while time.monotonic() < enough or (log.read_bytes().count(b"\n") < STEPS and time.monotonic() < deadline):
                time.sleep(0.2)
            process.send_signal(signal.SIGINT)
        if process.wait(timeout=60) != 128 + signal.SIGINT:
            raise SystemExit(f"{model} on {shards} workers failed: {text.read_text()[-2000:]}")
    finally:
        if process.poll() is None:
            process.kill()
        for limit in slow:
            limit.close()


def windows(steps: list[dict]) -> list[list[dict]]:
    """Steps one after the other, in groups that took at least half a second together."""
    groups, group = [], []
    for step in steps:
        group.append(step)
        if sum(s["interval_s"] for s in group) >= WINDOW:
            groups.append(group)
            group = []
    return groups


def compare(run: Path) -> dict:
    steps = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    late = [s for s in steps[len(steps) // 2 :] if s["predicted_s"]]
    groups = windows(late)

    if not groups:
        raise SystemExit(f"{run}: {len(late)} steps in the second half are less than {WINDOW} s; ask for more --seconds")

    def mean(key: str) -> list[float]:
        return [statistics.mean(s.get(key, float("nan")) for s in g) for g in groups]

    measured = mean("interval_s")

    def off(key: str) -> float:
        return statistics.median(abs(p / m - 1) for p, m in zip(mean(key), measured))

    workers = json.loads((run / "summary.json").read_text())["workers"]
    return {
        "measured": statistics.median(measured),
        "predicted": statistics.median(mean("predicted_s")),
        "off": off("predicted_s"),
        "explained": statistics.median(e / m - 1 for e, m in zip(mean("explained_s"), measured)),
        "late": statistics.median(mean("late_s")),
        "single": statistics.median(abs(s["predicted_s"] / s["interval_s"] - 1) for s in late),
        "memory": [
            (m["planned"], m["compiled"], m["peak_rss"] - m["baseline_rss"]) for m in (w["memory"] for w in workers)
        ],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--shards", nargs="+", type=int, default=[1, 2, 3, 4])
    parser.add_argument("--seconds", type=float, default=8)
    parser.add_argument("--binary", type=Path, default=ROOT / "target/release/foreshard")
    parser.add_argument("--keep", type=Path, help="a directory for the runs; else they are thrown away")
    args = parser.parse_args()
    print(f"load average {os.getloadavg()[0]:.1f}, {len(os.sched_getaffinity(0))} cores, {args.seconds:g} s each\n")
    print("| model | workers | speeds | step | predicted | error | explained | late | single | memory, planned / compiler / seen, MiB |")
    print("|---|---|---|---|---|---|---|---|---|---|")
    worst, low = 0.0, 0
    with tempfile.TemporaryDirectory() as scratch:
        for model in args.models:
            for shards in args.shards:
                for uneven in [False, True] if shards > 1 else [False]:
                    run = (args.keep or Path(scratch)) / f"{model}-{shards}-{'uneven' if uneven else 'even'}"
                    train(model, shards, args.seconds, args.binary.resolve(), run, uneven)
                    row = compare(run)
                    memory = ", ".join(
                        f"{p / MIB:.0f} / {c / MIB:.0f} / {s / MIB:.0f}{' LOW' if p < s else ''}"
                        for p, c, s in row["memory"]
                    )
                    worst, low = max(worst, row["off"]), low + sum(p < s for p, _, s in row["memory"])
                    times = f"{row['measured'] * 1e3:.2f} ms | {row['predicted'] * 1e3:.2f} ms | {row['off']:.0%}"
                    speeds = "uneven" if uneven else "even"
                    print(
                        f"| {model} | {shards} | {speeds} | {times} | {row['explained']:+.0%} | {row['late'] * 1e3:.2f} ms "
                        f"| {row['single']:.0%} | {memory} |",
                        flush=True,
                    )
    print(f"\nworst error of a row {worst:.0%}, memory below what was seen: {low}")


if __name__ == "__main__":
    main()
