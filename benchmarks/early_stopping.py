"""Early stopping on the digits study: epochs spent and what was found, against the same trials trained to the end.

    python benchmarks/early_stopping.py               # five seeds, some minutes

For each seed the same 64 configs are searched twice, with `asha` and with `none`. Both are measured on the test split,
which neither saw: the difference between the two best trials' test losses, with its spread over the seeds, says whether
what was found is as good within noise.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks._record import keep

SPACE = Path(__file__).resolve().parents[1] / "search_spaces" / "digits.yaml"


def search(seed: int, rule: str, folder: Path) -> dict[str, object]:
    """The outcome of one launch."""
    command = [
        sys.executable, "-m", "hpsearch", "launch", str(SPACE), "--json", "--run-dir", str(folder / f"{rule}-{seed}"),
        "--set", f"seed={seed}", "--set", f"early_stopping.type={rule}",
        "--tracking-uri", f"sqlite:///{folder}/mlflow.db",
    ]  # fmt: skip
    start = time.perf_counter()
    done = subprocess.run(command, check=True, capture_output=True, text=True, cwd=folder)
    told = json.loads(done.stdout)
    return {
        "epochs": told["epochs"]["search"],
        "search(s)": told["stages_s"]["search"],
        "wall(s)": round(time.perf_counter() - start, 1),
        "val_loss": told["best"]["val"]["loss"],
        "test_loss": told["best"]["test"]["loss"],
        "test_accuracy": told["best"]["test"]["accuracy"],
        "ensemble_test_loss": told["ensemble"]["test"]["loss"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0] if __doc__ else "")
    parser.add_argument("--seeds", type=int, default=5)
    args = parser.parse_args()
    rows = []
    header = ("seed", "epochs", "without", "share", "test_loss", "without", "search(s)", "without")
    print("{:>4}  {:>6}  {:>7}  {:>6}  {:>9}  {:>8}  {:>9}  {}".format(*header))
    with tempfile.TemporaryDirectory() as folder:
        for seed in range(args.seeds):
            asha, full = (search(seed, rule, Path(folder)) for rule in ("asha", "none"))
            share = float(str(asha["epochs"])) / float(str(full["epochs"]))
            rows.append({"seed": seed, "asha": asha, "none": full, "share_of_epochs": round(share, 4)})
            print(
                f"{seed:4d}  {asha['epochs']:>6}  {full['epochs']:>7}  {share:6.1%}  {asha['test_loss']:9.4f}  "
                f"{full['test_loss']:8.4f}  {asha['search(s)']:9}  {full['search(s)']}",
                flush=True,
            )
    shares = [row["share_of_epochs"] for row in rows]
    differences = [float(row["asha"]["test_loss"]) - float(row["none"]["test_loss"]) for row in rows]  # type: ignore[index]
    mean = statistics.mean(differences)
    error = statistics.stdev(differences) / len(differences) ** 0.5 if len(differences) > 1 else float("nan")
    print(f"epochs: {statistics.mean(shares):.1%} of those without early stopping (at most {max(shares):.1%})")
    print(f"test loss of the best trial, asha minus none: {mean:+.4f} ± {error:.4f} (mean and standard error)")
    summary = {"mean_difference": mean, "standard_error": error, "max_share_of_epochs": max(shares)}
    what = "digits study, 64 trials, 27 epochs, eta 3: asha against no early stopping"
    keep("early_stopping", what, rows, packages=["torch", "ray", "scikit-learn"], summary=summary)


if __name__ == "__main__":
    main()
