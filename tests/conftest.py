from __future__ import annotations

from functools import partial

import pytest
import torch

from .rules import NETWORKS

# The networks here are tiny: a second thread costs more than it brings.
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def network_of_the_rule(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """`cnn()` and `mlp()` make a network that the rule at hand can train."""
    given = getattr(request.node, "callspec", None)
    rule = None if given is None else given.params.get("rule", given.params.get("build"))
    rule = rule.args[0] if isinstance(rule, partial) and rule.args else rule
    for name, network in NETWORKS.get(rule, {}).items():
        if hasattr(request.module, name):
            monkeypatch.setattr(request.module, name, network)
