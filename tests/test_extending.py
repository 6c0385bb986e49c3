"""Where the next thing goes (docs/architecture.md): a rule of each family that the core is made for, in a few lines."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import bioopt
from bioopt.core.acts import OutputGate, clamp
from bioopt.core.params import named_parameters_of, synapses_of
from experiments.run import run

from .commands import config


def network(dtype: torch.dtype = torch.float64) -> nn.Sequential:
    torch.manual_seed(0)
    layers = [nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 7), nn.Tanh(), nn.Linear(7, 3)]
    return nn.Sequential(*layers).to(dtype)


def data(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(20, 6, generator=generator, dtype=dtype), torch.randint(3, (20,), generator=generator)


class PredictiveCoding(bioopt.LearningRule):
    """A rule with relaxed states: they settle between prediction and loss, and weights follow their errors."""

    def __init__(self, params: Any, lr: float, *, steps: int, inference_lr: float, beta: float) -> None:
        self.steps, self.inference_lr, self.beta = steps, inference_lr, beta
        super().__init__(params, {"lr": lr})

    def _select(self, group: dict[str, Any]) -> tuple[list[Any], list[bioopt.Synapse]]:
        return named_parameters_of(group["params"]), synapses_of("PredictiveCoding", group["params"])

    def _estimate(self, probe: bioopt.Probe) -> Any:
        states: list[Tensor] = []
        readout = list(self._recorder.synapses.values())[-1]

        def descended(wrt: Any) -> tuple[Tensor, list[Tensor]]:
            """The loss, and the gradient of the energy with the loss, summed over samples."""
            gate, energy, number = OutputGate(), torch.zeros((), dtype=torch.float64), iter(range(len(states) + 9))

            def leave(firing: bioopt.Firing, u: Tensor) -> Tensor:
                nonlocal energy
                if firing.synapse is readout:
                    return gate(u)
                if (i := next(number)) == len(states):
                    states.append(u.detach().clone().requires_grad_())
                energy = energy + (states[i] - u).square().sum() / 2
                return clamp(states[i])

            with self._recorder.acting(lambda synapse, x: x, leave), torch.enable_grad():
                losses = probe(grad=True)
                losses.mean().backward()
            ((u, error),) = gate.errors
            outputs, scale = (energy, u), (torch.ones_like(energy), self.beta * len(u) * error)
            return losses.detach(), [*torch.autograd.grad(outputs, wrt(), scale)]

        for _ in range(self.steps):
            losses, grads = descended(lambda: states)
            for state, g in zip(states, grads, strict=True):
                state.data.sub_(g, alpha=self.inference_lr)
        params = self._trained()
        losses, grads = descended(lambda: params)
        scale = 1 / (self.beta * len(losses))
        return losses, {p: scale * g for p, g in zip(params, grads, strict=True)}, {}


def test_a_rule_with_relaxed_states() -> None:
    """For a weak loss the equilibrium's update is the gradient."""
    model, (x, y) = network(), data()
    F.cross_entropy(model(x), y).backward()
    expected = [p.grad.clone() for p in model.parameters()]
    optimizer = PredictiveCoding(model, 0.1, steps=60, inference_lr=0.3, beta=1e-4)
    optimizer.estimate(lambda: F.cross_entropy(model(x), y, reduction="none"))
    assert optimizer.forward_passes == 61
    for p, g in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(p.grad, g, rtol=1e-2, atol=1e-5)


class LocalError(bioopt.LocalLossRule):
    """A local loss: the squared error of a linear readout of each layer's activity, as the next layer receives it."""

    def new_head(self, block: bioopt.local.Block) -> nn.Module:
        return nn.LazyLinear(self.number_of_classes, dtype=block.synapses[-1].weight.dtype)

    def local_loss(self, block: bioopt.local.Block, h: Tensor, channel_dim: int) -> Tensor:
        return F.mse_loss(self.head(block, h), F.one_hot(self.labels(h), self.number_of_classes).to(h.dtype))


@pytest.mark.parametrize("loop", ["closure", "classic"])
def test_a_local_loss(loop: str) -> None:
    model, (x, y) = network(), data()
    optimizer = LocalError(model, 0.5, descent=torch.optim.SGD)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.5, total_steps=200)
    first = None
    for _ in range(150):
        optimizer.target = y
        optimizer.zero_grad()
        if loop == "closure":
            loss = optimizer.step(lambda: F.cross_entropy(model(x), y))
        else:
            loss = F.cross_entropy(model(x), y)
            loss.backward()
            optimizer.step()
        scheduler.step()
        first = first or float(loss.detach())
    assert float(loss.detach()) < 0.2 * first
    again = LocalError(network(), 0.5, descent=torch.optim.SGD)
    again.load_state_dict(optimizer.state_dict())  # before its first pass: heads get sizes and values
    for a, b in zip(optimizer._owned.modules.parameters(), again._owned.modules.parameters(), strict=True):
        assert torch.equal(a, b)


def test_weights_above_a_block_do_not_change_what_it_learns() -> None:
    updates = []
    for change in (0.0, 1.0):
        model, (x, y) = network(), data()
        with torch.no_grad():
            model[4].weight.add_(change)
        optimizer = LocalError(model, 0.5, descent=torch.optim.SGD)
        optimizer.target = y
        optimizer.estimate(lambda model=model, x=x, y=y: F.cross_entropy(model(x), y))
        updates.append([p.grad.clone() for p in model[:3].parameters()])
    for one, other in zip(*updates, strict=True):
        assert torch.equal(one, other)


def run_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, files: dict[str, str], *chosen: str) -> dict[str, Any]:
    """A short run with files of one's own: modules, and choices for configuration groups."""
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    short = ["epochs=1", "batch_size=256", f"run_dir={tmp_path}/run"]
    return run(config(f"hydra.searchpath=[file://{tmp_path}]", *short, *chosen))


@pytest.mark.usefixtures("undrawn")
def test_a_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = {
        "wide.py": """
from torch import nn

def wide(shape, classes, *, hidden):
    inputs = shape[0] * shape[1] * shape[2]
    return nn.Sequential(nn.Flatten(), nn.Linear(inputs, hidden), nn.ReLU(), nn.Linear(hidden, classes))
""",
        "model/wide.yaml": "name: wide\n_target_: wide.wide\nhidden: 50\n",
    }
    assert run_with(tmp_path, monkeypatch, files, "model=wide", "logger.mode=disabled")["model"] == "wide"


@pytest.mark.usefixtures("undrawn")
def test_a_logger(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = {
        "lines.py": """
from experiments.logs import Logger

class Lines(Logger):
    def __init__(self, config, folder, run_id):
        self.file = (folder / config["logger"]["file"]).open("w")

    def log(self, numbers):
        print(*numbers, file=self.file)

    def finish(self, summary, pictures):
        self.close()
        return "numbers are in a file"

    def close(self):
        self.file.close()
""",
        "logger/lines.yaml": "classes: {lines: lines.Lines}\nmode: auto\nevery: 50\nfile: lines.txt\n",
    }
    run_with(tmp_path, monkeypatch, files, "logger=[csv,lines]", "model=mlp")
    assert (tmp_path / "run" / "numbers.csv").exists()
    lines = (tmp_path / "run" / "lines.txt").read_text().splitlines()
    assert lines[0] == "step train/loss"
    assert any("test/accuracy" in line for line in lines)


@pytest.mark.parametrize("wrong", [lambda product: product.mean(0, keepdim=True), lambda product: None])
def test_an_update_that_does_not_fit_names_the_rule_and_the_layer(wrong: Any) -> None:
    class Wrong(bioopt.LocalProductRule):
        def signal(self, u: Tensor, synapse: bioopt.Synapse, group: dict[str, Any]) -> Tensor:
            return u

        def update(self, product: Tensor, signal: Tensor, synapse: bioopt.Synapse, group: dict[str, Any]) -> Any:
            return wrong(product) if synapse.index == 1 else product

    model, (x, y) = network(), data()
    optimizer = Wrong(model, 0.1)
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(TypeError, match=r"Wrong: its update for layer '2' is .*must have the shape .* \(7, 8\)"):
        optimizer.step(lambda: F.cross_entropy(model(x), y))
    assert all(torch.equal(p, q) for p, q in zip(before, model.parameters(), strict=True))
