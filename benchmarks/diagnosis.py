"""Diagnoses against labels given by hand: learning curves of TaskSet, looked at without their diagnosis.

The curves are drawn at random from the configurations that got anywhere (validation loss below 0.66, where 0.693
ignores the inputs). The rules were adjusted while looking at the first set (seed 11); the second (seed 23) was labelled
afterwards, and is the figure that counts. A curve that a person would call two things has two labels, and either counts
as agreement.

    python benchmarks/diagnosis.py --data FOLDER      FOLDER holds the TaskSet files (see benchmarks/README.md)
"""

from __future__ import annotations

import argparse
import gzip
import json
import math
from collections import Counter
from pathlib import Path
from typing import Any

from _record import keep

from hpsearch.diagnosis import Finding, Reference, diagnose

NAMES = {
    "P": Finding.PLATEAUED,
    "I": Finding.IMPROVING,
    "O": Finding.OVERFITTING,
    "S": Finding.OSCILLATING,
    "D": Finding.DIVERGED,
    "U": Finding.UNDERFITTING,
}
# (file in alphabetical order, configuration): labels
ADJUSTED_ON = {
    (3, 762): "PI",
    (2, 381): "I",
    (1, 565): "PI",
    (5, 665): "I",
    (5, 706): "I",
    (4, 472): "I",
    (0, 999): "PO",
    (0, 304): "IP",
    (4, 381): "PI",
    (3, 155): "IP",
    (0, 67): "O",
    (5, 381): "IP",
    (1, 663): "I",
    (0, 8): "SI",
    (4, 861): "I",
    (4, 246): "I",
    (1, 70): "IS",
    (4, 647): "I",
    (4, 452): "I",
    (1, 995): "I",
    (1, 884): "I",
    (4, 514): "POI",
    (3, 790): "PI",
    (4, 791): "PO",
    (1, 469): "O",
    (1, 894): "OP",
    (0, 532): "I",
    (0, 464): "D",
    (3, 198): "IP",
    (1, 711): "PO",
    (5, 464): "D",
    (1, 791): "O",
    (1, 452): "IP",
    (2, 889): "I",
    (4, 73): "I",
    (1, 179): "IP",
    (5, 659): "IP",
    (2, 839): "P",
    (0, 926): "I",
    (3, 311): "IP",
    (4, 743): "I",
    (2, 155): "I",
    (1, 500): "O",
    (3, 971): "PI",
    (2, 999): "IP",
    (2, 680): "I",
    (1, 725): "I",
    (1, 298): "O",
}
HELD_OUT = {
    (4, 2): "I",
    (5, 680): "I",
    (0, 665): "O",
    (5, 926): "I",
    (3, 67): "PI",
    (1, 669): "O",
    (5, 1): "I",
    (0, 2): "I",
    (3, 711): "P",
    (0, 861): "O",
    (4, 565): "IS",
    (5, 866): "I",
    (2, 514): "I",
    (0, 678): "O",
    (0, 94): "O",
    (4, 679): "I",
    (3, 63): "PI",
    (4, 665): "O",
    (5, 791): "PI",
    (1, 924): "PI",
    (2, 246): "I",
    (1, 177): "I",
    (0, 29): "IS",
    (0, 909): "I",
    (5, 70): "I",
    (2, 2): "I",
    (1, 731): "PI",
    (0, 688): "O",
    (3, 177): "PI",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of the TaskSet files, *.json.gz")
    data = parser.parse_args().data
    tasks = [json.loads(gzip.decompress(path.read_bytes())) for path in sorted(data.glob("*.json.gz"))]
    kept = {}
    for name, labels in (("adjusted on", ADJUSTED_ON), ("held out", HELD_OUT)):
        agreed, table = compared(tasks, labels)
        print(f"{name}: agreement {agreed} of {len(labels)}")
        print(f"  {'by hand':40} {'found':28} curves")
        for (by_hand, found), count in sorted(table.items()):
            print(f"  {by_hand:40} {found:28} {count:6}")
        rows = [{"by_hand": a, "found": b, "curves": n} for (a, b), n in sorted(table.items())]
        kept[name] = {"agreed": agreed, "curves": len(labels), "table": rows}
    keep("diagnosis", "curves whose diagnosis agrees with a label given by hand", kept)


def compared(tasks: list[Any], labels: dict[tuple[int, int], str]) -> tuple[int, Counter[tuple[str, str]]]:
    """How many curves have a finding among their labels, and which findings met which labels."""
    agreed, table = 0, Counter[tuple[str, str]]()
    for (task, number), by_hand in labels.items():
        curve = tasks[task][number]
        best = sorted(min(c["train"]["loss"]) for c in tasks[task] if all(map(math.isfinite, c["train"]["loss"])))
        reference = Reference(baseline=math.log(2), best_train=best[len(best) // 100])
        found = {each.finding for each in diagnose(curve["train"]["loss"], curve["valid"]["loss"], reference)}
        names = {NAMES[label] for label in by_hand}
        agreed += bool(found & names)
        table["/".join(sorted(names)), "/".join(sorted(found)) or "nothing"] += 1
    return agreed, table


if __name__ == "__main__":
    main()
