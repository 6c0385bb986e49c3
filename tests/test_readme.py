"""The README's Python runs as written, and its commands have options that exist."""

from __future__ import annotations

import re
import shlex
from collections import OrderedDict

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
    assert len(blocks) == 4
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


def test_the_tables_name_every_choice() -> None:
    for group in ("optimizer", "model", "data", "cost"):
        for path in (ROOT / "conf" / group).glob("*.yaml"):
            assert f"`{path.stem}`" in README, path.stem
    for name in bioopt.__all__:
        assert name in README, name
