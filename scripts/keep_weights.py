"""Keep the weights of a recorded run in half precision, for `hubconf.py`, and measure what they are worth.

    python scripts/keep_weights.py mnist-cnn8-softhebb runs/...-seed0

They go to ``experiments/records/<name>/weights.pt``, and their accuracy on the test set to its ``result.json``.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from experiments.config import resolved
from experiments.files import write_json, write_whole
from experiments.models.pixels import packed, unpacked
from experiments.weights import accuracy_of, network_of

RECORDS = Path(__file__).parent.parent / "experiments" / "records"
MOST = 300_000  # bytes of a file in the repository


def keep(name: str, run: Path) -> float:
    """Write the weights; returns their accuracy.

    Raises:
        SystemExit: there is no such record, or the run cannot be kept; nothing is written.
    """
    record = RECORDS / name / "result.json"
    if not record.exists():
        raise SystemExit(f"error: {name} has no record; make it first, by scripts/record.py")
    try:
        model, config, images = network_of(run)
    except (ValueError, OSError) as error:
        raise SystemExit(f"error: {error}") from None
    options = {key: value for key, value in resolved(config)["model"].items() if key != "_target_"}
    content = packed(model, options, images.shape, images.classes)
    if len(content) > MOST:
        raise SystemExit(f"error: the weights of {run} have {len(content):,} bytes, more than {MOST:,}")
    write_whole(record.parent / "weights.pt", content)
    accuracy = accuracy_of(unpacked(record.parent / "weights.pt"), images)
    write_json(record, json.loads(record.read_text(encoding="utf-8")) | {"weights_test_accuracy": accuracy})
    return accuracy


def main() -> None:
    """Keep, and print the accuracy."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("name")
    parser.add_argument("run", type=Path)
    options = parser.parse_args()
    print(f"{keep(options.name, options.run):.2%} of the test images are right in half precision")


if __name__ == "__main__":
    main()
