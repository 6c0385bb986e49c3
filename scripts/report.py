"""Compare finished runs: prints a table, and writes `report.html`, `report.md`, `report.csv` and pictures to a folder.

python scripts/report.py runs/compare_mnist
python scripts/report.py runs/a runs/b --accuracy 97 --out somewhere
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from experiments.finished import NothingToReport
from experiments.report import report


def main() -> None:
    """Read the runs, write the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, help="folders of runs, or folders that hold such folders")
    parser.add_argument("--accuracy", type=float, help="in %%, for the column 'time to'")
    parser.add_argument("--out", type=Path, help="where to write; by default the folder that holds all of RUNS")
    options = parser.parse_args()
    if options.accuracy is not None and not 0 <= options.accuracy <= 100:
        parser.error(f"--accuracy {options.accuracy:g} must be from 0 to 100")
    out = options.out or Path(os.path.commonpath([path.resolve() for path in options.runs]))
    if options.out is None and (out / "config.yaml").exists():
        out = out.parent  # a run's own folder is never changed
    try:
        print(report(options.runs, out, None if options.accuracy is None else options.accuracy / 100))
    except NothingToReport as error:
        parser.exit(1, f"error: {error}\n")


if __name__ == "__main__":
    main()
