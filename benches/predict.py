"""Predicted against measured: step time and memory of every shard, for the sample models on one to four workers.

Each model trains for a while on each number of workers, once undisturbed and once with the CPU time of every second worker
halved by a quota. Step times are compared with what had been predicted before each step, by what had been learned until
then, over the second half of the run; memory, beyond what a worker has when its executables are ready, with what the plan
said before anything ran.

    benches/predict.py [--models char_gpt mlp_digits] [--shards 1 2 3 4] [--steps 60] [--binary target/release/foreshard]
"""

import argparse
import json
import subprocess
import tempfile
import time
from pathlib import Path

from contention import limits

ROOT = Path(__file__).resolve().parent.parent
MANIFESTS = {"char_gpt": "manifests/charlm.yaml", "mlp_digits": "manifests/digits.yaml"}
SLOWED = 0.5
MIB = 2**20


def median(values: list[float]) -> float:
    return sorted(values)[len(values) // 2] if values else float("nan")


def train(model: str, shards: int, steps: int, binary: Path, run: Path, uneven: bool) -> None:
    """Runs a job to its end; its run directory then holds what was predicted and what was seen."""
    command = [binary, "local", "run", MANIFESTS[model], "--shards", shards, "--steps", steps, "--quiet", "--run-dir", run]
    with open(run.with_suffix(".log"), "w") as said:
        job = subprocess.Popen([str(c) for c in command], cwd=ROOT, stdout=said, stderr=said)
    slow = limits() if uneven else []
    try:
        # From the first step on, so that nothing is slowed while it compiles.
        log = run / "log.jsonl"
        while uneven and job.poll() is None and not (log.exists() and log.stat().st_size > 0):
            time.sleep(0.05)
        pids = json.loads((run / "pids.json").read_text()) if uneven and job.poll() is None else {}
        for worker, limit in zip(range(1, shards, 2), slow):
            limit.take(pids[str(worker)])
            limit.limit(SLOWED)
        if job.wait(timeout=600) != 0:
            raise SystemExit(f"{model} on {shards} workers failed: {run.with_suffix('.log').read_text()[-2000:]}")
    finally:
        job.poll() is None and job.kill()
        for limit in slow:
            limit.close()


def compare(run: Path) -> tuple[float, float, float, list[tuple[float, float]]]:
    """Measured and predicted step, the median relative error, and (planned, seen) bytes by rank."""
    steps = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    late = [s for s in steps[len(steps) // 2 :] if s.get("predicted_s")]
    errors = [abs(s["predicted_s"] / s["seconds"] - 1) for s in late]
    workers = json.loads((run / "summary.json").read_text())["workers"]
    memory = [(w["memory"]["planned"], w["memory"]["peak_rss"] - w["memory"]["baseline_rss"]) for w in workers]
    return median([s["seconds"] for s in late]), median([s["predicted_s"] for s in late]), median(errors), memory


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(MANIFESTS), choices=list(MANIFESTS))
    parser.add_argument("--shards", nargs="+", type=int, default=[1, 2, 3, 4])
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--binary", type=Path, default=ROOT / "target/release/foreshard")
    args = parser.parse_args()
    print("| model | workers | speeds | step | predicted | error | memory by worker, planned / seen, MiB |")
    print("|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as scratch:
        for model in args.models:
            for shards in args.shards:
                for uneven in [False, True] if shards > 1 else [False]:
                    run = Path(scratch) / f"{model}-{shards}-{uneven}"
                    train(model, shards, args.steps, args.binary.resolve(), run, uneven)
                    step, predicted, error, memory = compare(run)
                    shown = ", ".join(f"{p / MIB:.0f} / {s / MIB:.0f}{' LOW' if p < s else ''}" for p, s in memory)
                    speeds = "uneven" if uneven else "even"
                    times = f"{step * 1e3:.1f} ms | {predicted * 1e3:.1f} ms | {error:.0%}"
                    print(f"| {model} | {shards} | {speeds} | {times} | {shown} |", flush=True)


if __name__ == "__main__":
    main()
