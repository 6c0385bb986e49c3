"""`torch.compile` and bfloat16 autocast: both work as with any optimizer, if it is built first.

A compiled model keeps the hooks that it had when it first ran; leave `fullgraph=True` out, as they run in Python. Only
what lies between the watched layers is compiled, so models with much in between gain most. Use no GradScaler: bfloat16
needs none, and with float16 it works only with rules of one forward pass that send a loss backward.

    python examples/compile_autocast.py [backend]    # inductor by default, which needs a C++ compiler
"""

import sys

import torch
import torch.nn.functional as F
from digits import accuracy, batches, images, labels, network

import bioopt


def train(backend: str | None, autocast: bool) -> float:
    """Hebbian learning, compiled by this backend if any; returns the accuracy."""
    model = network()
    optimizer = bioopt.Hebbian(model)
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
print(f"eager: {train(None, False):.1f} % of the unseen digits")
print(f"compiled: {train(backend, False):.1f} %")
print(f"compiled, in bfloat16: {train(backend, True):.1f} %")
