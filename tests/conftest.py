# torch is imported by the tests alone: pytest-xdist's own process, which loads this file first, has no use for it.
import gc
from collections.abc import Iterator

import pytest


def pytest_collection_finish() -> None:
    """What is there by now stays, and the garbage collector, which some tests call, need not look at it each time."""
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """The networks here are tiny: a second thread costs more than it brings."""
    import torch

    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def network_of_the_rule(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a test of ``rule``, or of what ``build`` makes, `cnn()` and `mlp()` are networks that the rule can train."""
    from .rules import NETWORKS

    case = getattr(request.node, "callspec", None)
    rule = case and (case.params.get("rule") or getattr(case.params.get("build"), "args", [None])[0])
    for name, network in NETWORKS.get(rule, {}).items():
        monkeypatch.setattr(request.module, name, network, raising=False)


@pytest.fixture
def fresh_accelerate() -> Iterator[None]:
    """accelerate keeps the settings of its first `Accelerator` for the whole process: without those of other tests."""
    from accelerate.state import AcceleratorState, GradientState

    def forget() -> None:
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()

    forget()
    yield
    forget()


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs leave out the pictures that every run has."""
    from .commands import undraw

    undraw(monkeypatch.setattr)
