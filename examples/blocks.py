"""A cost for each part of a network: the trunk brings digits of a class together, the head classifies them.

No error passes from the head to the trunk. Each part has an optimizer of its own, whose closure runs that part only, so
any rule can train it: here the trunk learns by a backward pass inside it, and then without any.
"""

import torch
from digits import accuracy, batches, images, labels, network

import bioopt
from bioopt.costs import CrossEntropy, SupervisedContrastive


def train(model: torch.nn.Sequential, trunk_rule: torch.optim.Optimizer, epochs: int = 10) -> float:
    """The trunk learns from its own cost, and the head by SGD from the trunk's output."""
    trunk, head = model[:-1], model[-1:]
    blocks = [
        (trunk, SupervisedContrastive(), trunk_rule),
        (head, CrossEntropy(), torch.optim.SGD(head.parameters(), lr=0.1, momentum=0.9)),
    ]
    for _ in range(epochs):
        for batch in batches():
            x, y = images[batch], labels[batch]
            for block, cost, optimizer in blocks:

                def closure(x=x, y=y, block=block, cost=cost, optimizer=optimizer) -> torch.Tensor:
                    optimizer.zero_grad()
                    losses = cost(block(x), y, inputs=x)
                    if losses.requires_grad:
                        losses.mean().backward()
                    return losses

                optimizer.step(closure)
                with torch.no_grad():
                    x = block.eval()(x)  # the next part gets values without a graph
                block.train()
    return accuracy(model)


model = network(hidden=64)
print(f"before training: {accuracy(model):.1f} % of the unseen digits")

model = network(hidden=64)
by_gradient = train(model, torch.optim.SGD(model[:-1].parameters(), lr=0.1, momentum=0.9))
print(f"trunk by gradients of its own cost: {by_gradient:.1f} %")

model = network(hidden=64)
perturbation = bioopt.NodePerturbation(model[:-1], lr=0.05, sigma=0.01, relative=False, samples=4, momentum=0.9)
print(f"trunk by node perturbation, no backward pass in it: {train(model, perturbation):.1f} %")
