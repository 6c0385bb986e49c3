from __future__ import annotations

from functools import partial

import pytest
import torch

from . import rules

# The networks here are tiny: a second thread costs more than it brings.
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _spiking_networks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a test builds `cnn` or `mlp` for a rule of spikes, it gets the spiking network in its place."""
    given = getattr(request.node, "callspec", None)
    rule = None if given is None else given.params.get("rule", given.params.get("build"))
    if (rule.args[0] if isinstance(rule, partial) and rule.args else rule) in rules.SPIKING:
        for name in ("cnn", "mlp"):
            if hasattr(request.module, name):
                monkeypatch.setattr(request.module, name, getattr(rules, f"spiking_{name}"))
