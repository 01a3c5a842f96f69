"""Seconds that `hpsearch --help` and `hpsearch validate` take, and which heavy libraries they load.

python benchmarks/startup.py
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks._record import keep

SPACE = Path(__file__).resolve().parents[1] / "search_spaces" / "digits.yaml"
HEAVY = ("torch", "ray", "mlflow", "optuna", "scipy", "numpy", "matplotlib")
WHICH = f"""
import sys
from hpsearch.cli import run
run(sys.argv[1:])
print([name for name in {HEAVY!r} if name in sys.modules], file=sys.stderr)
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0] if __doc__ else "")
    parser.add_argument("--repeats", type=int, default=9)
    args = parser.parse_args()
    rows = []
    for arguments in (["--help"], ["validate", str(SPACE)]):
        times = []
        for _ in range(args.repeats):
            start = time.perf_counter()
            subprocess.run([sys.executable, "-m", "hpsearch", *arguments], check=True, capture_output=True)
            times.append(time.perf_counter() - start)
        loaded = subprocess.run([sys.executable, "-c", WHICH, *arguments], check=True, capture_output=True, text=True)
        row = {
            "command": f"hpsearch {arguments[0]}",
            "median(s)": round(statistics.median(times), 3),
            "slowest(s)": round(max(times), 3),
            "loaded": loaded.stderr.strip().splitlines()[-1],
        }
        print(f"{row['command']:18} {row['median(s)']} s (slowest {row['slowest(s)']}), loads {row['loaded']}")
        rows.append(row)
    keep("startup", "wall time of two commands, seconds", rows, packages=["click", "pydantic"], repeats=args.repeats)


if __name__ == "__main__":
    main()
