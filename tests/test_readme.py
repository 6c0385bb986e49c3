"""The README is short and true: its Python runs, its commands compose, its numbers are those of the records."""

from __future__ import annotations

import json
import re
import shlex
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import bioopt

from .commands import ROOT, config

README = (ROOT / "README.md").read_text()


def test_the_loops_of_the_readme() -> None:
    x, y = torch.randn(8, 1, 6, 6), torch.arange(8) % 3
    trunk = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten())
    model = nn.Sequential(OrderedDict(trunk=trunk, head=nn.Linear(64, 3)))
    names = {"model": model, "loader": [(x, y)] * 3, "F": F, "bioopt": bioopt, "x": x, "y": y}
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len(blocks) == 3
    for block in blocks:
        with torch.no_grad():
            model.trunk[0].weight.mul_(2)  # so that homeostasis, which the last block has reached, has something to do
        before = model.trunk[0].weight.detach().clone()
        exec(block, names)
        if "step" not in block:
            names["losses"] = names["optimizer"].step(names["closure"])
        assert not torch.equal(before, model.trunk[0].weight)
        names["optimizer"].close()


def composed(text: str) -> list[str]:
    """The commands of a page, each composed by Hydra; for a sweep, its first run."""
    commands = [command.strip() for command in re.findall(r"^(python train\.py [^#\n]*)", text, re.MULTILINE)]
    for command in commands:
        words = shlex.split(command)[2:]
        sweep = "-m" in words
        config(*[w.split(",")[0] if sweep else w for w in words if not w.startswith(("-m", "resume=", "hydra"))])
    return commands


def test_the_commands_of_the_readme_compose() -> None:
    assert len(composed(README)) >= 4


def test_it_is_read_in_five_minutes() -> None:
    assert len(README.split()) <= 1200


def test_its_numbers_are_those_of_the_records() -> None:
    rows = re.findall(r"^\|.*\]\((experiments/records/.*result\.json)\) \|$", README, re.MULTILINE)
    assert len(rows) == 6
    for record in rows:
        result = json.loads((ROOT / record).read_text())
        (row,) = [line for line in README.splitlines() if record in line]
        assert f"| {100 * result['mean']:.2f} " in row, record


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md"])
def test_its_links_lead_somewhere(page: str) -> None:
    links = re.findall(r"""(?:\]\(|src=")(?!https?:)([^)"]+)""", (ROOT / page).read_text())
    assert len(links) >= 5
    for link in links:
        path, _, anchor = link.partition("#")
        assert (ROOT / path).exists(), link
        assert not anchor or anchor in headings(ROOT / path), link


def headings(page: Path) -> list[str]:
    """The anchors of a page."""
    found = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return [re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in found]


def test_the_options_name_every_choice() -> None:
    options = (ROOT / "docs" / "experiments.md").read_text()
    for group in ("optimizer", "model", "data", "cost", "logger", "experiment"):
        for path in (ROOT / "conf" / group).glob("*.yaml"):
            assert f"`{path.stem}`" in options, path.stem


def test_the_pages_name_all_that_is_public() -> None:
    pages = "".join(page.read_text() for page in (ROOT / "docs").glob("**/*.md"))
    for name in bioopt.__all__:
        assert name in pages, name
