"""Every rule as a drop-in: ``Rule(model)`` in one plain loop, on ordinary networks it was not made for.

    python scripts/dropin.py                                         # all rules, networks and seeds on MNIST in [0, 1]
    python scripts/dropin.py --rules softhebb oja --networks mlp     # some
    python scripts/dropin.py --data cifar10 --scale byte --seeds 0
    python scripts/dropin.py --table                                 # the tables alone, from finished runs

Each run is one line of ``<out>/runs.jsonl``; finished runs are not repeated. The controls are SGD, ``random_trunk`` (a
frozen random trunk with the readout that every rule has) and ``homeostasis`` (the trunk random, but homeostatic). A
seed draws the network and the order of the batches, the same for all rules, so that differences are paired.

The tables give the test accuracy, its difference to both controls (mean ± 95 % confidence interval over seeds), and how
far the trunk has turned: the mean of ``1 - cos`` between a neuron's weights at the start and at the end. For local
rules, homeostasis *is* the rule with its trunk's rate at 0; for rules of perturbation and reward that control is
``<rule>_still``.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector

sys.path.insert(0, str(Path(__file__).parent.parent))

import bioopt
from experiments import models
from experiments.data import load
from experiments.statistics import interval

Network = Callable[[int, int], nn.Module]
Rule = Callable[[nn.Module], torch.optim.Optimizer]


class Backpropagation(bioopt.FeedbackRule):
    """With the options of feedback rules."""

    def feedback(self, synapse: bioopt.Synapse, g: Tensor, x_shape: torch.Size) -> Tensor:
        """The error, by the forward weights."""
        return synapse.transpose(synapse.weight, g, x_shape)


class Residual(nn.Module):
    """``x + f(x)`` with group norm."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(channels, channels, 3, padding=1, bias=False),
            nn.GroupNorm(4, channels),
            nn.ReLU(),
            nn.Conv2d(channels, channels, 3, padding=1, bias=False),
            nn.GroupNorm(4, channels),
        )

    def forward(self, x: Tensor) -> Tensor:
        """The block's activity."""
        return F.relu(x + self.body(x))


def mlp(activation: type[nn.Module], channels: int, size: int) -> nn.Module:
    """Two hidden layers of 256."""
    inputs = channels * size * size
    hidden = [nn.Linear(inputs, 256), activation(), nn.Linear(256, 256), activation()]
    return nn.Sequential(nn.Flatten(), *hidden, nn.Linear(256, 10))


def deep(channels: int, size: int) -> nn.Module:
    """Six hidden layers of 128."""
    widths = [channels * size * size, *[128] * 6]
    hidden = [layer for a, b in itertools.pairwise(widths) for layer in (nn.Linear(a, b), nn.ReLU())]
    return nn.Sequential(nn.Flatten(), *hidden, nn.Linear(128, 10))


def convolution(inputs: int, outputs: int, kernel: int = 3, norm: bool = True) -> list[nn.Module]:
    """A convolution, batch norm and ReLU."""
    conv = nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, bias=not norm)
    return [conv, *([nn.BatchNorm2d(outputs)] if norm else []), nn.ReLU()]


def cnn(norm: bool, channels: int, size: int) -> nn.Module:
    """Two convolutions of 5 x 5."""
    first, second = convolution(channels, 16, 5, norm), convolution(16, 32, 5, norm)
    readout = nn.Linear(32 * (size // 4) ** 2, 10)
    return nn.Sequential(*first, nn.MaxPool2d(2), *second, nn.MaxPool2d(2), nn.Flatten(), readout)


def lenet5(channels: int, size: int) -> nn.Module:
    """LeNet-5 with tanh and average pooling."""
    return nn.Sequential(
        *(nn.Conv2d(channels, 6, 5, padding=2), nn.Tanh(), nn.AvgPool2d(2)),
        *(nn.Conv2d(6, 16, 5), nn.Tanh(), nn.AvgPool2d(2), nn.Flatten()),
        *(nn.Linear(16 * ((size // 2 - 4) // 2) ** 2, 120), nn.Tanh()),
        *(nn.Linear(120, 84), nn.Tanh(), nn.Linear(84, 10)),
    )


def pooled(channels: int, size: int) -> nn.Module:
    """Two convolutions, whose mean over all positions the readout sees."""
    first, second = convolution(channels, 32, 5, False), convolution(32, 64, 5, False)
    return nn.Sequential(*first, nn.MaxPool2d(2), *second, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))


def vgg(channels: int, size: int) -> nn.Module:
    """Four convolutions with batch norm."""
    return nn.Sequential(
        *(*convolution(channels, 16), *convolution(16, 16), nn.MaxPool2d(2)),
        *(*convolution(16, 32), *convolution(32, 32), nn.MaxPool2d(2)),
        *(nn.Flatten(), nn.Linear(32 * (size // 4) ** 2, 10)),
    )


def separable(channels: int, size: int) -> nn.Module:
    """Depthwise and pointwise convolutions with batch norm, as in mobile networks."""
    depthwise = nn.Conv2d(32, 32, 3, padding=1, groups=32, bias=False)
    return nn.Sequential(
        *(*convolution(channels, 32), nn.MaxPool2d(2), depthwise, nn.BatchNorm2d(32), nn.ReLU()),
        *(*convolution(32, 64, 1), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(64 * (size // 4) ** 2, 10)),
    )


def residual(channels: int, size: int) -> nn.Module:
    """Two residual blocks with group norm."""
    return nn.Sequential(
        *(nn.Conv2d(channels, 16, 3, padding=1, bias=False), nn.GroupNorm(4, 16), nn.ReLU(), nn.AvgPool2d(2)),
        *(Residual(16), nn.AvgPool2d(2), Residual(16), nn.Flatten(), nn.Linear(16 * (size // 4) ** 2, 10)),
    )


def resnet18(channels: int, size: int) -> nn.Module:
    """torchvision's, with a stem of 3 x 3 for small images."""
    from torchvision.models import resnet18

    model: nn.Module = resnet18(num_classes=10)
    model.conv1 = nn.Conv2d(channels, 64, 3, stride=2, padding=1, bias=False)
    model.maxpool = nn.Identity()
    return model


NETWORKS: dict[str, Network] = {
    "mlp": partial(mlp, nn.ReLU),
    "mlp_tanh": partial(mlp, nn.Tanh),
    "cnn": partial(cnn, False),
    "cnn_bn": partial(cnn, True),
    "lenet5": lenet5,
    "vgg_bn": vgg,
    "residual_gn": residual,
    "resnet18": resnet18,
}
ORDINARY = list(NETWORKS)  # run by default; further ones where ``--networks`` names them
NETWORKS |= {
    "mlp_sigmoid": partial(mlp, nn.Sigmoid),
    "mlp_deep": deep,
    "lenet5_relu": lambda channels, size: models.lenet5((channels, size, size), 10),
    "cnn_pooled": pooled,
    "cnn_separable": separable,
}
CONTROLS = ("sgd", "random_trunk", "homeostasis")
RULES: dict[str, Rule] = {
    "sgd": lambda model: torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9),
    "random_trunk": lambda model: bioopt.Homeostasis(model, lr=0.0),
    "homeostasis": bioopt.Homeostasis,
    "hebbian": bioopt.Hebbian,
    "softhebb": bioopt.SoftHebb,
    "krotov_hopfield": bioopt.KrotovHopfield,
    "oja": bioopt.Oja,
    "sanger": bioopt.Sanger,
    "bcm": bioopt.BCM,
    "anti_hebbian": bioopt.AntiHebbian,
    "local_contrastive": bioopt.LocalContrastive,
    "local_loss": bioopt.LocalLoss,
    "local_perturbation": bioopt.LocalPerturbation,
    "mono_forward": bioopt.MonoForward,
    "forward_forward": bioopt.ForwardForward,
    "predictive_coding": bioopt.PredictiveCoding,
    "predictive_coding_error": partial(bioopt.PredictiveCoding, mode="error"),
    "predictive_coding_incremental": partial(bioopt.PredictiveCoding, mode="incremental"),
    "dual_propagation": bioopt.DualPropagation,
    "equilibrium_propagation": bioopt.EquilibriumPropagation,
    "equilibrium_propagation_hopfield": partial(bioopt.EquilibriumPropagation, energy="hopfield"),
    "difference_target_propagation": bioopt.DifferenceTargetPropagation,
}
FEEDBACK: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "feedback_alignment": bioopt.FeedbackAlignment,
    "sign_symmetry": bioopt.SignSymmetry,
    "kolen_pollack": bioopt.KolenPollack,
    "weight_mirror": bioopt.WeightMirror,
    "direct_feedback_alignment": bioopt.DirectFeedbackAlignment,
    "drtp": bioopt.DRTP,
    "direct_kolen_pollack": bioopt.DirectKolenPollack,
    "eprop": bioopt.EProp,  # which is direct feedback alignment here, as it warns: these networks have no time
}
RULES |= FEEDBACK
for _name, _rule in {
    "reward_hebbian": bioopt.RewardHebbian,
    "node_perturbation": bioopt.NodePerturbation,
    "forward_gradient": bioopt.ForwardGradient,
    "weight_perturbation": bioopt.WeightPerturbation,
}.items():
    RULES[_name] = _rule
    RULES[f"{_name}_delta"] = partial(_rule, readout="delta")
    RULES[f"{_name}_still"] = partial(_rule, lr=0.0, readout="delta")  # what the readout reaches alone
#: rules besides those of feedback that learn on centred presynaptic activity
DESCENDING = (
    *("local_loss", "mono_forward", "forward_forward", "local_contrastive", "local_perturbation", "predictive_coding"),
    *("dual_propagation", "difference_target_propagation", "node_perturbation_delta", "forward_gradient_delta"),
)
DIVERGED = {"accuracy": 0.1, "turned": 0.0, "first_loss": 1.0, "last_loss": 1.0, "step_ms": 0.0}
#: what made the difference: each leaves one thing out
PLAIN: dict[str, Any] = {"readout_lr": 0.02, "readout_options": {"momentum": 0.9}}
ABLATIONS: dict[str, Rule] = {
    "random_trunk, plain readout": lambda model: bioopt.Homeostasis(model, lr=0.0, **PLAIN),
    "homeostasis, plain readout": lambda model: bioopt.Homeostasis(model, **PLAIN),
}
for _name, _local, _inhibition in (
    ("hebbian", bioopt.Hebbian, 10.0),  # other than by default
    ("softhebb", bioopt.SoftHebb, 10.0),
    ("krotov_hopfield", bioopt.KrotovHopfield, 10.0),
    ("oja", bioopt.Oja, 0.0),
):
    ABLATIONS[f"{_name}, inhibition {_inhibition:g}"] = partial(_local, inhibition=_inhibition)
    ABLATIONS[f"{_name}, constant rate"] = partial(_local, settle=0.0)
    ABLATIONS[f"{_name}, no whitening"] = partial(_local, whitening=0.0)
    ABLATIONS[f"{_name}, no homeostasis"] = partial(_local, lr=0.01, homeostasis=False)
    ABLATIONS[f"{_name}, as before"] = partial(_local, lr=0.01, homeostasis=False, **PLAIN)
# What feedback rules do beyond Adam and orthogonal updates, which help backpropagation as well.
for _name, _local_loss in {
    "local_loss": bioopt.LocalLoss,
    "local_perturbation": bioopt.LocalPerturbation,
    "mono_forward": bioopt.MonoForward,
    "forward_forward": bioopt.ForwardForward,
}.items():
    ABLATIONS[f"{_name}, delta readout"] = partial(_local_loss, readout="delta")
ABLATIONS["local_contrastive, plain readout"] = partial(bioopt.LocalContrastive, readout=None)
ABLATIONS["adam"] = lambda model: torch.optim.Adam(model.parameters(), lr=2e-3)
ABLATIONS["adam, orthogonal"] = lambda model: Backpropagation(model, lr=2e-3, descent=torch.optim.Adam, orthogonal=True)
for _name, _feedback in FEEDBACK.items():
    ABLATIONS[f"{_name}, orthogonal"] = partial(_feedback, orthogonal=True)
    ABLATIONS[f"{_name}, as published"] = partial(_feedback, centre_inputs=False, orthogonal=False, fan_in=None)
for _name in DESCENDING:
    ABLATIONS[f"{_name}, as published"] = partial(RULES[_name], centre_inputs=False)
SETTINGS = ("data", "scale", "images", "epochs", "batch", "held_out")
SCALES = ("unit", "standard", "byte")


def images(name: str, root: str, scale: str, count: int, held_out: bool) -> list[Tensor]:
    """Training images and labels, and those that accuracy is measured on.

    Args:
        name: of the data set.
        root: its folder.
        scale: ``"unit"``, [0, 1]; ``"byte"``, [0, 255]; ``"standard"``, mean 0 and deviation 1 of each channel.
        count: the number of training images.
        held_out: measure on the last 2,000 training images, to choose settings, in place of the test set.
    """
    data = load(name, root)
    x, y = data.train_images, data.train_labels
    test = (x[-2000:], y[-2000:]) if held_out else (data.test_images, data.test_labels)
    x, y, seen = x[:count].float(), y[:count].long(), test[0].float()
    if scale == "unit":
        x, seen = x / 255, seen / 255
    elif scale == "standard":
        mean, deviation = x.mean((0, 2, 3), keepdim=True), x.std((0, 2, 3), keepdim=True)
        x, seen = (x - mean) / deviation, (seen - mean) / deviation
    return [x, y, seen, test[1].long()]


def run(make: Rule, network: Network, data: list[Tensor], seed: int, epochs: int, batch: int) -> dict[str, Any]:
    """Train one network; accuracy, losses, rotation of the trunk, and seconds a step."""
    x, y, seen, labels = data
    torch.manual_seed(seed)
    model = network(x.shape[1], x.shape[2])
    trunk = [layer.weight for layer in model.modules() if type(layer) in (nn.Linear, nn.Conv2d)][:-1]
    before = [w.detach().clone() for w in trunk]
    optimizer: Any = make(model)
    order, losses, start = torch.Generator().manual_seed(100 + seed), [], time.perf_counter()
    for _ in range(epochs):
        for index in torch.randperm(len(x), generator=order).split(batch):
            optimizer.target = y[index]  # for the rules that need one

            def closure(index: Tensor = index) -> Tensor:
                optimizer.zero_grad()
                loss = F.cross_entropy(model(x[index]), y[index], reduction="none")
                if loss.requires_grad:
                    loss.mean().backward()
                return loss

            losses.append(float(optimizer.step(closure).detach().mean()))
    seconds = time.perf_counter() - start
    model.eval()
    predict = getattr(optimizer, "relaxed", model)  # of a network whose states relax before they predict
    with torch.no_grad():
        right = sum(
            int((predict(a).argmax(1) == b).sum()) for a, b in zip(seen.split(500), labels.split(500), strict=True)
        )
        turned = [
            1 - F.cosine_similarity(w.flatten(1), b.flatten(1)).mean().item()
            for w, b in zip(trunk, before, strict=True)
        ]
        finite = bool(parameters_to_vector(model.parameters()).isfinite().all())
    return {
        "accuracy": right / len(seen),
        "first_loss": statistics.fmean(losses[:10]),
        "last_loss": statistics.fmean(losses[-20:]),
        "turned": statistics.fmean(turned),
        "step_ms": 1000 * seconds / len(losses),
        "finite": finite,
    }


def cell(values: list[float], digits: int = 1) -> str:
    """The mean in percent, with its interval, or of two values both; empty where there is none."""
    if not values:
        return ""
    if len(values) == 2:
        return f"{100 * min(values):.{digits}f} to {100 * max(values):.{digits}f}"
    half = interval(values)
    mean = f"{100 * statistics.fmean(values):.{digits}f}"
    return mean + ("" if half is None else f" ± {100 * half:.{digits}f}")


def tables(runs: list[dict[str, Any]]) -> str:
    """Markdown tables of finished runs, a section for each setting."""
    sections: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for one in runs:
        sections.setdefault(tuple(one[key] for key in SETTINGS), []).append(one)
    return "\n".join(section(chosen) for chosen in sections.values())


def section(runs: list[dict[str, Any]]) -> str:
    """The tables of runs of one setting."""
    one = runs[0]
    found = {(r["rule"], r["network"], r["seed"]): r for r in runs}
    networks = [name for name in NETWORKS if any(r["network"] == name for r in runs)]
    rules = [name for name in RULES | ABLATIONS if any(r["rule"] == name for r in runs)]
    seeds = sorted({r["seed"] for r in runs})
    where = "2,000 held-out training images" if one["held_out"] else "the test set"
    text = [
        f"## {one['data']}, input in {one['scale']} scale, {one['images']:,} images, {one['epochs']} epochs, batches "
        f"of {one['batch']}\n\nAccuracy in % on {where}; of seeds {', '.join(map(str, seeds))}, those that were run.\n"
    ]

    def table(
        value: Callable[[dict[str, Any]], float], skip: tuple[str, ...], other: str = "", digits: int = 1
    ) -> None:
        text.append("| rule | " + " | ".join(networks) + " |\n|---|" + "---:|" * len(networks))
        for rule in (name for name in rules if name not in skip):
            row = []
            for network in networks:
                keys = [(network, seed) for seed in seeds if (rule, network, seed) in found]
                keys = [key for key in keys if not other or (other, *key) in found]
                less = [value(found[other, *key]) if other else 0.0 for key in keys]
                row.append(cell([value(found[rule, *key]) - b for key, b in zip(keys, less, strict=True)], digits))
            text.append(f"| {rule} | " + " | ".join(row) + " |")
        text.append("")

    table(lambda r: r["accuracy"], skip=())
    for control in CONTROLS[1:]:
        if control in rules:
            text.append(f"Difference to {control}, paired by seed:\n")
            table(lambda r: r["accuracy"], skip=("sgd", control), other=control)
    text.append("How far the trunk has turned, 100 (1 - cos):\n")
    table(lambda r: r["turned"], skip=CONTROLS)
    text.append("Last training loss, in % of the first:\n")
    table(lambda r: r["last_loss"] / r["first_loss"], skip=(), digits=0)
    text.append("Time of a step, ms:\n")
    table(lambda r: r["step_ms"] / 100, skip=(), digits=0)
    return "\n".join(text)


def main() -> None:
    """Run what is missing, and write the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rules", nargs="+", default=list(RULES), choices=list(RULES | ABLATIONS))
    parser.add_argument("--ablations", action="store_true", help="run the ablations in place of the rules")
    parser.add_argument("--networks", nargs="+", default=ORDINARY, choices=list(NETWORKS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--data", default="mnist")
    parser.add_argument("--root", default="data", help="folder of the data sets")
    parser.add_argument("--scale", default="unit", choices=SCALES)
    parser.add_argument("--images", type=int, default=6000)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument(
        "--held-out", action="store_true", help="measure on held-out training images, to choose settings"
    )
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("experiments/records/dropin"))
    parser.add_argument("--table", action="store_true", help="write the tables alone")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    path = options.out / "runs.jsonl"
    options.out.mkdir(parents=True, exist_ok=True)
    settings = {key: getattr(options, key) for key in SETTINGS}
    data: list[Tensor] = []
    for seed in () if options.table else options.seeds:
        for network in options.networks:
            for rule in ABLATIONS if options.ablations else options.rules:
                which = {"rule": rule, "network": network, "seed": seed, **settings}
                if any(which.items() <= done.items() for done in finished(path)):
                    continue
                data = data or images(options.data, options.root, options.scale, options.images, options.held_out)
                try:
                    result = run(
                        (RULES | ABLATIONS)[rule], NETWORKS[network], data, seed, options.epochs, options.batch
                    )
                except bioopt.Diverged as error:
                    result = {
                        "accuracy": 0.1,
                        "turned": 0.0,
                        "first_loss": 1.0,
                        "last_loss": 1.0,
                        "diverged": str(error),
                    }
                with path.open("a") as file:
                    file.write(json.dumps(which | result) + "\n")
                print(f"{rule} {network} seed {seed}: {100 * result['accuracy']:.1f} %", flush=True)
    text = tables(finished(path))
    (options.out / "README.md").write_text(f"# Rules as drop-ins\n\nBy `python scripts/dropin.py`.\n\n{text}")
    print(text)


def finished(path: Path) -> list[dict[str, Any]]:
    """The results of all finished runs."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


if __name__ == "__main__":
    main()
