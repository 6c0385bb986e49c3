"""Connections that bypass layers: with ``skips="cut"`` they carry no error, as if the network detached them."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import bioopt

from ..rules import weights


class Net(nn.Module):
    """Blocks with a connection past them, which ``cut`` detaches.

    Args:
        join: from what bypasses a block and the block's own activity to its output.
        block: activity within the block.
        cut: whether the network itself detaches what bypasses a block.
    """

    def __init__(self, kind: str, cut: bool) -> None:
        super().__init__()
        self.kind = kind
        self.past: Callable[[Tensor], Tensor] = Tensor.detach if cut else lambda x: x
        wide = 4 if kind == "concatenated" else 2
        self.stem, self.readout = nn.Conv2d(2, 4, 3, padding=1), nn.Linear(8 if wide == 4 else 4, 5)
        self.one, self.two = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        self.three, self.past_two = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 1)
        self.norms = nn.ModuleList([nn.GroupNorm(2, 4) for _ in range(3)])

    def forward(self, x: Tensor) -> Tensor:
        h = self.stem(x)
        if self.kind == "before activation":
            for layer, norm in zip((self.one, self.two, self.three), self.norms, strict=True):
                h = self.past(h) + layer(F.relu(norm(h)))
        elif self.kind == "concatenated":
            h = torch.relu(h)
            h = torch.cat([self.past(h), torch.relu(self.one(h))], 1)
        elif self.kind == "two layers in a block":
            h = torch.relu(h)
            h = F.relu(self.past(h) + self.norms[1](self.two(F.relu(self.norms[0](self.one(h)), inplace=True))), True)
            h = F.relu(self.past(h) + self.norms[2](self.three(h)), inplace=True)
        elif self.kind == "a layer beside":
            h = torch.relu(h)
            h = torch.relu(self.past_two(h) + self.two(torch.relu(self.one(h))))
        elif self.kind == "checkpointed":
            h = torch.tanh(h)
            h = torch.tanh(self.past(h) + checkpoint(self.one, h, use_reentrant=False))
            h = torch.tanh(self.past(h) + checkpoint(self.two, h, use_reentrant=False))
        else:  # long: past both blocks
            start = h = torch.relu(h)
            h = self.two(torch.relu(self.one(h)))
            h += self.past(start)
        return self.readout(h.mean((2, 3)))


KINDS = ["before activation", "concatenated", "two layers in a block", "a layer beside", "checkpointed", "long"]
X, Y = torch.randn(6, 2, 6, 6, generator=torch.Generator().manual_seed(0)), torch.arange(6) % 5


def learned(kind: str, rule: Any, cut: bool, run: Callable[..., Any] = lambda m: m, **options: Any) -> list[Tensor]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Net(kind, cut)
    optimizer = rule(model, 0.1, descent=torch.optim.SGD, **options)
    for _ in range(2):
        optimizer.zero_grad()
        F.cross_entropy(run(model)(X), Y).backward()
        optimizer.step()
    return weights(model)


@pytest.mark.parametrize("rule", [bioopt.FeedbackAlignment, bioopt.DirectFeedbackAlignment])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.filterwarnings("ignore:.*did not fire")
def test_a_cut_skip_carries_no_error(kind: str, rule: type) -> None:
    wanted, got = learned(kind, rule, True), learned(kind, rule, False, skips="cut")
    for a, b in zip(wanted, got, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)
    kept = learned(kind, rule, False)
    alike = [torch.equal(a, b) for a, b in zip(kept, got, strict=True)]
    assert all(alike) == (kind == "a layer beside")


@pytest.mark.filterwarnings("ignore")  # of the compiler, at graph breaks
def test_a_cut_skip_of_a_compiled_model() -> None:
    torch._dynamo.reset()
    compiled = learned("two layers in a block", bioopt.FeedbackAlignment, False, skips="cut",
                       run=lambda m: torch.compile(m, backend="aot_eager"))  # fmt: skip
    plain = learned("two layers in a block", bioopt.FeedbackAlignment, False, skips="cut")
    for a, b in zip(plain, compiled, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_skips_are_checked() -> None:
    with pytest.raises(ValueError, match="FeedbackAlignment: skips='some' must be one of keep, cut"):
        bioopt.FeedbackAlignment(Net("long", False), skips="some")


@pytest.mark.filterwarnings("ignore:.*did not fire")
def test_cut_skips_keep_no_graph_alive() -> None:
    def alive() -> int:
        gc.collect()
        return sum(issubclass(type(o), Tensor) for o in gc.get_objects())

    model = Net("two layers in a block", False)
    optimizer = bioopt.FeedbackAlignment(model, skips="cut")
    counts = []
    for _ in range(3):
        for _ in range(3):
            optimizer.zero_grad()
            F.cross_entropy(model(X), Y).backward()
            optimizer.step()
        model(X)  # whose loss is dropped
        counts.append(alive())
    assert counts[1] == counts[2]
