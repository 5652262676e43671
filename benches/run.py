"""`make bench`: Foreshard against JAX and PyTorch on the same cores, in the same run.

Every number is printed raw and as a ratio; nothing here passes or fails. Run it on a quiet machine.

    benches/run.py [--only single pipeline memory planner cutover overhead contention] [--steps 24]
"""

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from contention import contention as contended

ROOT = Path(__file__).resolve().parent.parent
BINARY = ROOT / "target/release/foreshard"
PYTHON = sys.executable
GPT = dict(layers=6, width=256, heads=8, ctx=128, batch=8, microbatches=[1, 8], dropout=0.0)
TOKENS = GPT["batch"] * GPT["ctx"]


PLUGIN = ROOT / ".foreshard/plugins/xla_plugins/xla_cpu_pjrt/xla_cpu_pjrt.so"
SAME_PLUGIN = {"JAX_PLATFORMS": "plugin_cpu", "PJRT_NAMES_AND_LIBRARY_PATHS": f"plugin_cpu:{PLUGIN}"}


class Missing(Exception):
    """A peer that does not run here."""


def python(*args: str, cores: str, **environment: str) -> str:
    env = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT / "python"), **environment}
    out = subprocess.run(["taskset", "-c", cores, PYTHON, *args], cwd=ROOT / "python", env=env,
                         capture_output=True, text=True)  # fmt: skip
    if out.returncode:
        last = out.stderr.strip().splitlines()[-1:] or [f"it ended with {out.returncode}"]
        raise Missing(f"{args[0]}: {last[0]}")
    return out.stdout


def gpt_options(**options: object) -> list[str]:
    return [x for k, v in {**GPT, **options}.items() for x in ("--set", f"{k}={json.dumps(v)}")]


def export(bundle: Path) -> None:
    python("-m", "foreshard.cli", "models/char_gpt.py", "-o", str(bundle), *gpt_options(), cores="0-1")


def batches(path: Path, steps: int) -> None:
    import numpy as np
    from safetensors.numpy import save_file

    text = np.frombuffer((ROOT / "examples/data/tinyshakespeare.txt").read_bytes(), np.uint8).astype(np.int32)
    rows, ctx = steps * GPT["batch"], GPT["ctx"]
    at = np.arange(rows)[:, None] * ctx + np.arange(ctx)
    save_file({"tokens": text[at], "targets": text[at + 1]}, path)


def reference(data: Path, microbatch: int, cores: str, **environment: str) -> float:
    out = python("reference.py", "models/char_gpt.py", str(data), "--microbatch", str(microbatch), "--bench",
                 *gpt_options(), cores=cores, **environment)  # fmt: skip
    return json.loads(out)["step_seconds"]


def manifest(bundle: Path, data: Path, scratch: Path, shards: int, cores: int, microbatch: int, steps: int,
             **spec: object) -> Path:  # fmt: skip
    """A job that only trains: no checkpoints and no other plans, unless `spec` says so."""
    job = {
        "apiVersion": "foreshard.dev/v1alpha1",
        "kind": "TrainingJob",
        "metadata": {"name": "bench"},
        "spec": {
            "bundle": str(bundle),
            "data": {"uri": str(data), "shuffle": "none"},
            "steps": steps,
            "parallelism": {"shards": shards, "microbatch": microbatch},
            "resources": {"cores": cores},
            "checkpoint": {"everySteps": 0},
            "adaptation": {"mode": "Off"},
            **spec,
        },
    }
    path = scratch / "job.yaml"
    path.write_text(json.dumps(job))
    return path


def command(path: Path, scratch: Path) -> tuple[list[str], Path]:
    run = scratch / f"run-{len(list(scratch.iterdir()))}"
    return [str(BINARY), "local", "run", "--quiet", "--traced-steps", "0", "--run-dir", str(run), str(path)], run


def foreshard(*args: object, **spec: object) -> dict:
    path = manifest(*args, **spec)
    line, run = command(path, path.parent)
    subprocess.run(line, cwd=ROOT, check=True)
    return results(run)


def results(run: Path) -> dict:
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    summary = json.loads((run / "summary.json").read_text())
    return {**summary, "seconds": summary["step_seconds"]["median"], "lines": lines}


def rounds(n: int, *measure) -> list[float | None]:
    """Medians of `n` measurements each, taken in turn so that a slow minute hits all; `None` for a peer that is missing."""
    times: list[list[float]] = [[] for _ in measure]
    missing = set()
    for _ in range(n):
        for i, m in enumerate(measure):
            if i in missing:
                continue
            try:
                times[i].append(m())
            except Missing as e:
                print(f"  not measured: {e}")
                missing.add(i)
    return [statistics.median(t) if i not in missing else None for i, t in enumerate(times)]


def said(seconds: float | None) -> str:
    return "-" if seconds is None else f"{1e3 * seconds:.1f} ms"


def ratio(a: float | None, b: float | None) -> str:
    return "-" if a is None or b is None else f"{a / b:.3f}"


def single(bundle: Path, data: Path, scratch: Path, steps: int) -> None:
    print("\none shard against jax.jit of the whole step, one core, microbatch = batch")
    ours, theirs, same = rounds(
        3,
        lambda: foreshard(bundle, data, scratch, 1, 1, GPT["batch"], steps)["seconds"],
        lambda: reference(data, GPT["batch"], "0"),
        lambda: reference(data, GPT["batch"], "0", **SAME_PLUGIN),
    )
    print(f"  foreshard {said(ours)}, jax {said(theirs)}, ratio {ratio(ours, theirs)} (target <= 1.03)")
    print(f"  jax through the same plug-in as Foreshard {said(same)}, ratio {ratio(ours, same)}")


def pipeline(bundle: Path, data: Path, scratch: Path, steps: int) -> None:
    n = GPT["batch"]
    print(f"\ntwo shards on one core each, {n} microbatches, against one-core JAX")
    ours, alone, jax, parts = rounds(
        3,
        lambda: foreshard(bundle, data, scratch, 2, 1, 1, steps)["seconds"],
        lambda: foreshard(bundle, data, scratch, 1, 1, 1, steps)["seconds"],
        lambda: reference(data, GPT["batch"], "0"),
        lambda: reference(data, 1, "0"),
    )
    print(f"  foreshard {said(ours)} per step, {TOKENS / ours:.0f} tokens/s")
    if jax is not None:
        bubble = 1 / (n + 1)
        ideal = 2 * (1 - bubble) * TOKENS / jax
        print(f"  one-core jax {said(jax)} per step, {TOKENS / jax:.0f} tokens/s")
        print(f"  2 x jax x (1 - bubble {bubble:.3f}) = {ideal:.0f} tokens/s, ratio {TOKENS / ours / ideal:.3f} (target >= 0.90)")
        print(f"  the same {n} microbatches on one core: foreshard {said(alone)}, jax {said(parts)}; two shards against "
              f"2 x foreshard's one x (1 - bubble): {alone / (2 * (1 - bubble)) / ours:.3f}")
    try:
        out = json.loads(python("peers/torch_pipeline.py", cores="0-1").splitlines()[-1])
    except Missing as e:
        print(f"  torch.distributed.pipelining is not measured: {e}")
        return
    theirs = out["tokens_per_second"]
    print(f"  torch.distributed.pipelining {theirs:.0f} tokens/s, ratio {TOKENS / ours / theirs:.3f}")


def memory(bundle: Path, data: Path, scratch: Path, steps: int) -> None:
    print("\nmemory per worker: planned, by the compiler, observed (peak resident above what the process had compiled)")
    for shards, microbatch in [(1, GPT["batch"]), (2, 1)]:
        for worker in foreshard(bundle, data, scratch, shards, 1, microbatch, 6)["workers"]:
            m = worker["memory"]
            observed = m["peak_rss"] - m["baseline_rss"]
            mib = lambda b: f"{b / 2**20:.1f} MiB"
            print(f"  {shards} shards, worker {worker['rank']}: planned {mib(m['planned'])}, compiled {mib(m['compiled'])}, "
                  f"observed {mib(observed)}, planned/observed {m['planned'] / max(observed, 1):.2f}, "
                  f"compiled/observed {m['compiled'] / max(observed, 1):.2f}")  # fmt: skip


def cutover(bundle: Path, data: Path, scratch: Path, steps: int) -> None:
    print("\ncutover: two shards, one core each; the cut moves, then all shards change places")
    path = manifest(bundle, data, scratch, 2, 1, 1, 10 * steps)
    line, run = command(path, scratch)
    job = subprocess.Popen(line, cwd=ROOT)
    log = run / "log.jsonl"
    while job.poll() is None and (not log.exists() or log.read_text().count("\n") < 10):
        time.sleep(0.2)
    plan = json.loads((run / "plan.json").read_text())
    other = scratch / "other.json"
    # Twice: the second time every executable is in the cache on disk.
    for _ in range(2):
        plan["shards"][0]["devices"], plan["shards"][1]["devices"] = [s["devices"] for s in plan["shards"][::-1]]
        other.write_text(json.dumps(plan))
        subprocess.run([str(BINARY), "local", "recut", str(run), "--plan", str(other)], cwd=ROOT, check=True,
                       stdout=subprocess.DEVNULL)  # fmt: skip
    job.send_signal(signal.SIGINT)
    job.wait()
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    usual = statistics.median(line["interval_s"] for line in lines)
    for event in (json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()):
        if event["event"] == "cutover":
            step = next(line["interval_s"] for line in lines if line["step"] == event["at"] - 1)
            print(f"  {event['moved_bytes'] / 2**20:.1f} MiB moved, prepared in {event['prepare_seconds']:.1f} s, paused "
                  f"{1e3 * event['pause_seconds']:.2f} ms; that step took {1e3 * step:.1f} ms, "
                  f"{step / usual:.2f} x the median of {1e3 * usual:.1f} ms (target < 2)")  # fmt: skip


def overhead(bundle: Path, data: Path, scratch: Path, steps: int) -> None:
    print("\noverhead: profiling, monitoring and asynchronous checkpoints, against none of them; two shards")
    mean = lambda r: statistics.mean(line["interval_s"] for line in r["lines"][4:])
    without = lambda steps: lambda: mean(foreshard(bundle, data, scratch, 2, 1, 1, steps))
    # As a manifest has them when it says nothing, over two of them; and far more often than anybody would want.
    for every, n in [(100, 204), (8, steps)]:
        on = {"checkpoint": {"everySteps": every}, "adaptation": {"mode": "Recommend"}}
        a, b = rounds(3, lambda: mean(foreshard(bundle, data, scratch, 2, 1, 1, n, **on)), without(n))
        print(f"  a checkpoint every {every} steps: {said(a)} with, {said(b)} without, ratio {a / b:.3f} (target <= 1.02)")


def planner(*_: object) -> None:
    print("\nimport, plan and cut of a made-up model for 4 shards (targets: 5,000 ops <= 1 s, growth near linear)")
    subprocess.run([str(BINARY), "bench", "growth"], cwd=ROOT, check=True)


def contention(*_: object) -> None:
    contended(BINARY)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sections = {"single": single, "pipeline": pipeline, "memory": memory, "planner": planner, "cutover": cutover,
                "overhead": overhead, "contention": contention}  # fmt: skip
    parser.add_argument("--only", nargs="*", choices=sections, default=list(sections))
    parser.add_argument("--steps", type=int, default=24)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        scratch = Path(scratch)
        bundle, data = scratch / "gpt.bundle", scratch / "batches.safetensors"
        if set(args.only) - {"planner", "contention"}:
            export(bundle)
            batches(data, args.steps)
        for name in args.only:
            sections[name](bundle, data, scratch, args.steps)


if __name__ == "__main__":
    main()
