import pytest
import torch

from .rules import NETWORKS

# The networks here are tiny: a second thread costs more than it brings.
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def network_of_the_rule(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a test of ``rule``, or of what ``build`` makes, `cnn()` and `mlp()` are networks that the rule can train."""
    case = getattr(request.node, "callspec", None)
    rule = case and (case.params.get("rule") or getattr(case.params.get("build"), "args", [None])[0])
    for name, network in NETWORKS.get(rule, {}).items():
        monkeypatch.setattr(request.module, name, network, raising=False)
