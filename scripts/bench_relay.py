"""The cost of error feedback by relays: one step of `FeedbackRule` by the layers' own weights, and of SGD.

Both compute the same gradients, bit for bit (`tests/core/test_acts.py`), so the ratio is the price of the relays.

    python scripts/bench_relay.py
    python scripts/bench_relay.py --device cuda --json out.json

The variants run in turn within one process, and the medians of their times are compared.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parent.parent))

import bioopt
from experiments.models import cnn, lenet5, mlp
from scripts.bench_step import described, take_turns

SHAPE = (1, 28, 28)
NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "cnn, 32 channels": lambda: cnn(SHAPE, 10, width=32, kernel=5),
    "cnn, 64 channels": lambda: cnn(SHAPE, 10, width=64, kernel=5),
    "lenet5": lambda: lenet5(SHAPE, 10),
    "mlp 512-512": lambda: mlp(SHAPE, 10, hidden=[512, 512]),
}


class OwnWeights(bioopt.FeedbackRule):
    """Backpropagation."""

    def feedback(self, synapse: bioopt.Synapse, g: Tensor, x_shape: torch.Size) -> Tensor:
        """``Wᵀ g``."""
        return synapse.transpose(synapse.weight, g, x_shape)


def step(network: str, relayed: bool, amp: bool, device: torch.device, batch: int) -> Callable[[], object]:
    """One step on a network of its own."""
    torch.manual_seed(0)
    model = NETWORKS[network]().to(device, memory_format=torch.channels_last)
    x, y = torch.randn(batch, *SHAPE, device=device), torch.randint(10, (batch,), device=device)
    optimizer: torch.optim.Optimizer
    optimizer = OwnWeights(model, lr=1e-3) if relayed else torch.optim.SGD(model.parameters(), lr=1e-3)

    def run() -> None:
        optimizer.zero_grad()
        with torch.autocast(device.type, torch.bfloat16, enabled=amp):
            loss = F.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()

    return run


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--seconds", type=float, default=5.0, help="for each network and precision")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    device = torch.device(options.device)
    print(f"batch {options.batch}, {described(device)}\n")
    print("| network | precision | SGD, ms | relays, ms | ratio |")
    print("|---|---|---:|---:|---:|")
    rows = []
    for network in NETWORKS:
        for amp in (False, True):
            both = {
                "sgd": step(network, False, amp, device, options.batch),
                "relays": step(network, True, amp, device, options.batch),
            }
            taken = take_turns(both, device, options.seconds)
            row = {"network": network, "precision": "bf16" if amp else "float32", **taken}
            row["ratio"] = taken["relays"] / taken["sgd"]
            rows.append(row)
            print(
                f"| {network} | {row['precision']} | {taken['sgd']:.2f} | {taken['relays']:.2f} | {row['ratio']:.3f} |"
            )
    if options.json:
        record = {"device": described(device), "torch": torch.__version__, "batch": options.batch, "rows": rows}
        options.json.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
