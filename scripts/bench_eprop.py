"""Time and memory of learning in time: backpropagation through time, and e-prop in one pass and online.

    python scripts/bench_eprop.py
    python scripts/bench_eprop.py --steps 100 1000 10000 --hidden 200 --batch 16 --json out.json

One sequence of random spikes for each form and length, in a process of its own: milliseconds per time step, and how far
the peak of the memory rises above that of a sequence of one step.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parent.parent))

import bioopt
from bioopt.nn import ALIF, LIF

FORMS = ("bptt", "eprop", "online")
NEURONS = {"lif": LIF, "alif": ALIF}


class Network(nn.Module):
    """A recurrent layer of spiking neurons, and a readout."""

    def __init__(self, inputs: int, hidden: int, neurons: str) -> None:
        super().__init__()
        self.enter, self.recurrent = nn.Linear(inputs, hidden), nn.Linear(hidden, hidden, bias=False)
        self.neurons, self.readout = NEURONS[neurons](), nn.Linear(hidden, 2)

    def forward(self, x: Tensor, z: Tensor, state: Any) -> tuple[Tensor, Tensor, Any]:
        """One time step."""
        z, state = self.neurons(self.enter(x) + self.recurrent(z), state)
        return self.readout(z), z, state


def detached(state: Any) -> Any:
    """A state without its graph."""
    return state.detach() if isinstance(state, Tensor) else type(state)(*(detached(one) for one in state))


def measure(form: str, neurons: str, steps: int, inputs: int, hidden: int, batch: int) -> dict[str, float]:
    """One sequence."""
    torch.manual_seed(0)
    model = Network(inputs, hidden, neurons)
    optimizer: Any = (
        torch.optim.Adam(model.parameters()) if form == "bptt" else bioopt.EProp(model, online=form == "online")
    )

    def sequence(count: int) -> None:
        optimizer.zero_grad()
        z, state, total = torch.zeros(batch, hidden), None, torch.zeros(())
        if form == "online":
            optimizer.reset()
        for _ in range(count):
            y, z, state = model((torch.rand(batch, inputs) < 0.1).float(), z, state)
            loss = y.square().mean() / count
            if form == "online":
                loss.backward()
                z, state = z.detach(), detached(state)
            else:
                total = total + loss
        if form != "online":
            total.backward()
        optimizer.step()

    sequence(2)
    base, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
    sequence(steps)
    seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {"ms": 1000 * seconds / steps, "mb": (peak - base) / 1024}


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", nargs="+", type=int, default=[100, 1000, 4000])
    parser.add_argument("--neurons", nargs="+", default=list(NEURONS), choices=list(NEURONS))
    parser.add_argument("--inputs", type=int, default=100)
    parser.add_argument("--hidden", type=int, default=100)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--one", choices=FORMS, help="measure this form alone, in this process")
    options = parser.parse_args()
    sizes = {"inputs": options.inputs, "hidden": options.hidden, "batch": options.batch}
    if options.one:
        print(json.dumps(measure(options.one, options.neurons[0], options.steps[0], **sizes)))
        return
    print(", ".join(f"{name} {size}" for name, size in sizes.items()) + "; ms per time step, MB above the start\n")
    print("| | " + " | ".join(f"{steps} steps" for steps in options.steps) + " |")
    print("|---|" + "---:|" * len(options.steps))
    given = [f"--{name}={size}" for name, size in sizes.items()]
    rows, env = [], {**os.environ, "OMP_NUM_THREADS": "1"}
    for neurons in options.neurons:
        for form in FORMS:
            row: dict[str, Any] = {"neurons": neurons, "form": form, "found": []}
            for steps in options.steps:
                command = [sys.executable, __file__, "--one", form, "--neurons", neurons, "--steps", str(steps), *given]
                printed = subprocess.run(command, check=True, capture_output=True, text=True, env=env).stdout
                row["found"].append({"steps": steps, **json.loads(printed)})
            rows.append(row)
            cells = (f"{one['ms']:.2f}, {one['mb']:.0f}" for one in row["found"])
            print(f"| {neurons}, {form} | " + " | ".join(cells) + " |", flush=True)
    if options.json:
        options.json.write_text(json.dumps({**sizes, "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
