"""The cost of the feedback rules: one step of each, and of backpropagation by the same descent (Adam).

    python scripts/bench_feedback.py
    python scripts/bench_feedback.py --networks lenet5 --device cuda --json out.json

All steps of a network run in turn within one process, and the medians of their times are compared.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

sys.path.insert(0, str(Path(__file__).parent.parent))

import bioopt
from experiments.models import cnn, lenet5, mlp, resnet
from scripts.bench_step import described, take_turns

SHAPE = (1, 28, 28)
NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "mlp 512-512": lambda: mlp(SHAPE, 10, hidden=[512, 512]),
    "lenet5": lambda: lenet5(SHAPE, 10),
    "cnn, 32 channels": lambda: cnn(SHAPE, 10, width=32, kernel=5),
    "resnet": lambda: resnet(SHAPE, 10),
}
OPTIMIZERS: dict[str, Callable[[nn.Module], torch.optim.Optimizer]] = {
    "backpropagation": lambda model: torch.optim.Adam(model.parameters(), lr=1e-3),
    "FeedbackAlignment": bioopt.FeedbackAlignment,
    "FeedbackAlignment, orthogonal": lambda model: bioopt.FeedbackAlignment(model, orthogonal=True),
    "SignSymmetry": bioopt.SignSymmetry,
    "SignSymmetry, batchwise": lambda model: bioopt.SignSymmetry(model, mode="batchwise"),
    "KolenPollack": bioopt.KolenPollack,
    "WeightMirror": bioopt.WeightMirror,
    "DirectFeedbackAlignment": bioopt.DirectFeedbackAlignment,
    "DRTP": bioopt.DRTP,
    "DirectKolenPollack": bioopt.DirectKolenPollack,
}


def step(network: str, name: str, device: torch.device, batch: int) -> Callable[[], object]:
    """One step on a network of its own."""
    torch.manual_seed(0)
    model = NETWORKS[network]().to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    x, y = torch.randn(batch, *SHAPE, device=device), torch.randint(10, (batch,), device=device)
    optimizer = OPTIMIZERS[name](model)

    def run() -> None:
        optimizer.zero_grad()
        if isinstance(optimizer, bioopt.LearningRule):
            optimizer.target = y  # for DRTP
        F.cross_entropy(model(x), y).backward()
        optimizer.step()

    return run


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--networks", nargs="+", default=list(NETWORKS), choices=list(NETWORKS))
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--seconds", type=float, default=20.0, help="for each network")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    device = torch.device(options.device)
    print(f"batch {options.batch}, {described(device)}, step in ms and its ratio to backpropagation\n")
    print("| | " + " | ".join(options.networks) + " |\n|---|" + "---:|" * len(options.networks))
    taken = {
        network: take_turns(
            {name: step(network, name, device, options.batch) for name in OPTIMIZERS}, device, options.seconds
        )
        for network in options.networks
    }
    rows = []
    for name in OPTIMIZERS:
        ratios = {network: times[name] / times["backpropagation"] for network, times in taken.items()}
        rows.append({"rule": name, "ms": {n: times[name] for n, times in taken.items()}, "ratio": ratios})
        cells = (f"{taken[network][name]:.2f}, {ratios[network]:.2f}" for network in options.networks)
        print(f"| {name} | " + " | ".join(cells) + " |")
    if options.json:
        record = {"device": described(device), "torch": torch.__version__, "batch": options.batch, "rows": rows}
        options.json.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
