"""`torch.compile` and bfloat16 autocast: both as with any optimizer, if the optimizer is built first.

A compiled model keeps the hooks that it had when it first ran; leave `fullgraph=True` out, as they run in Python. What
lies between the watched layers is compiled, so it pays where that is much. No GradScaler: bfloat16 needs none, and with
float16 it serves only rules of one forward pass that send a loss backward.

    python examples/compile_autocast.py [backend]    # inductor by default, which needs a C++ compiler
"""

import sys

import torch
import torch.nn.functional as F
from digits import accuracy, batches, images, labels, network

import bioopt


def train(backend: str | None, autocast: bool) -> float:
    """Hebbian learning, as it is or faster."""
    model = network()
    optimizer = bioopt.Hebbian(model, lr=1.0, readout_lr=0.05, readout_options={"momentum": 0.9})
    if backend is not None:
        model.compile(backend=backend)
    for _ in range(5):
        for batch in batches():
            optimizer.zero_grad()
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                loss = F.cross_entropy(model(images[batch]), labels[batch])
            loss.backward()
            optimizer.step()
    return accuracy(model)


backend = sys.argv[1] if len(sys.argv) > 1 else "inductor"
print(f"as it is: {train(None, False):.1f} % of the unseen digits")
print(f"compiled: {train(backend, False):.1f} %")
print(f"compiled, in bfloat16: {train(backend, True):.1f} %")
