"""A loop of your own: two rules, and the controls to compare them with.

The optimizer is the only line that differs from gradient descent. Rules of one forward pass use the usual loop,
`loss.backward(); optimizer.step()`. Rules that compare losses need a closure, which all others accept too.
"""

import torch
import torch.nn.functional as F
from digits import accuracy, batches, images, labels, network
from torch import nn

import bioopt


def train(model: nn.Module, optimizer: torch.optim.Optimizer, epochs: int = 10) -> float:
    """The usual loop."""
    for _ in range(epochs):
        for batch in batches():
            optimizer.zero_grad()
            loss = F.cross_entropy(model(images[batch]), labels[batch])
            loss.backward()  # with a Hebbian rule it reaches the readout only
            optimizer.step()
    return accuracy(model)


def train_by_closure(model: nn.Module, optimizer: torch.optim.Optimizer, epochs: int = 10) -> float:
    """For every rule: the closure returns each sample's loss, with a backward pass only where gradients are enabled."""
    for _ in range(epochs):
        for batch in batches():

            def closure(batch: torch.Tensor = batch) -> torch.Tensor:
                optimizer.zero_grad()
                losses = F.cross_entropy(model(images[batch]), labels[batch], reduction="none")
                if losses.requires_grad:
                    losses.mean().backward()
                return losses

            optimizer.step(closure)
    return accuracy(model)


model = network()
print(f"before training: {accuracy(model):.1f} % of the unseen digits")

model = network()
hebbian = train(model, bioopt.Hebbian(model))
print(f"Hebbian trunk, readout by its local error: {hebbian:.1f} %")

model = network()
random = train(model, bioopt.Homeostasis(model, lr=0))
print(f"random trunk, the same readout: {random:.1f} %")

model = network()
perturbed = train_by_closure(model, bioopt.NodePerturbation(model, lr=2e-3))
print(f"node perturbation, without a backward pass: {perturbed:.1f} %")

model = network()
descended = train(model, torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9))
print(f"backpropagation: {descended:.1f} %")
