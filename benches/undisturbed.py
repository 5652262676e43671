"""Records the steps of a job that nothing disturbs: `tests/data/undisturbed_steps.csv` was made so.

    benches/undisturbed.py [--minutes 10] [--binary target/debug/foreshard] [-o tests/data/undisturbed_steps.csv]
"""

import argparse
import platform
import tempfile
import time
from pathlib import Path

from contention import ROOT, Run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--binary", type=Path, default=ROOT / "target/debug/foreshard")
    parser.add_argument("-o", "--output", type=Path, default=ROOT / "tests/data/undisturbed_steps.csv")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        run = Run("static", Path(scratch), args.binary.resolve(), 60)
        try:
            # The first steps warm up.
            run.wait_for(lambda: run.steps() >= 30, 120)
            time.sleep(60 * args.minutes)
        finally:
            run.stop()
        steps = run.lines("log.jsonl")[30:]
    micros = lambda seconds: str(round(1e6 * seconds))
    with args.output.open("w") as out:
        print(f"# The sample GPT in two workers on {platform.machine()}, a core of a virtual machine each, undisturbed for "
              f"{args.minutes:g} minutes.", file=out)  # fmt: skip
        print("# Microseconds of each step, from the end of the one before, and of each worker's own work in it; by "
              "benches/undisturbed.py.", file=out)  # fmt: skip
        for step in steps:
            print(",".join(map(micros, [step["interval_s"], *(w["busy_s"] for w in step["workers"])])), file=out)
    print(f"{len(steps)} steps in {args.output}")


if __name__ == "__main__":
    main()
