"""Run the notebooks of the examples, and keep what they print and draw in them.

python scripts/notebooks.py                            # all
python scripts/notebooks.py examples/spikes_and_memory.ipynb

It needs no Jupyter: cells are plain Python, run one after another.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import io
import json
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

ROOT = Path(__file__).parent.parent


def main() -> None:
    """Run those that are named, or all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("notebooks", nargs="*", type=Path)
    for path in parser.parse_args().notebooks or sorted((ROOT / "examples").glob("*.ipynb")):
        notebook = json.loads(path.read_text("utf-8"))
        run(notebook)
        path.write_text(json.dumps(notebook, indent=1, ensure_ascii=False) + "\n", "utf-8")
        print(path)


def run(notebook: dict[str, Any]) -> dict[str, object]:
    """Run the cells of a notebook, whose outputs are replaced; returns the names that they define."""
    names: dict[str, object] = {"__name__": "__main__"}
    count = 0
    plt.close("all")
    for cell in notebook["cells"]:
        if cell["cell_type"] != "code":
            continue
        count += 1
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile("".join(cell["source"]), f"cell {count}", "exec"), names)
        cell["execution_count"], cell["outputs"] = count, []
        if text := printed.getvalue():
            cell["outputs"].append({"name": "stdout", "output_type": "stream", "text": text.splitlines(keepends=True)})
        for number in plt.get_fignums():
            content = io.BytesIO()
            plt.figure(number).savefig(content, format="png", dpi=70, bbox_inches="tight")
            picture = {"image/png": base64.b64encode(content.getvalue()).decode(), "text/plain": ["<Figure>"]}
            cell["outputs"].append({"data": picture, "metadata": {}, "output_type": "display_data"})
        plt.close("all")
    return names


if __name__ == "__main__":
    main()
