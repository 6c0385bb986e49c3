"""PyTorch-Ignite: an engine runs any function that takes a step.

`create_supervised_trainer` calls `optimizer.step()` without a closure, after a backward pass: use it for rules of one
forward pass, also with `gradient_accumulation_steps`. For all rules, give `Engine` a function of your own. Clip between
`rule.estimate(closure)` and `rule.descend()`, which together are `rule.step(closure)`.
"""

import torch.nn.functional as F
from digits import accuracy, images, labels, network, train
from ignite.engine import Engine, Events, create_supervised_trainer
from ignite.handlers import LRScheduler
from torch import Tensor
from torch.nn.utils import clip_grad_norm_
from torch.optim.lr_scheduler import CosineAnnealingLR
from torch.utils.data import DataLoader, TensorDataset

import bioopt

EPOCHS = 10
loader = DataLoader(TensorDataset(images[train], labels[train]), batch_size=32, shuffle=True)

model = network()
print(f"before training: {accuracy(model):.1f} % of the unseen digits")

# Rules of one forward pass: Hebbian and its family
rule = bioopt.Hebbian(model)
create_supervised_trainer(model, rule, F.cross_entropy).run(loader, EPOCHS)
print(f"Hebbian: {accuracy(model):.1f} %")

# All rules
model = network()
rule = bioopt.NodePerturbation(model, lr=0.02, sigma=0.01, relative=False, samples=4, momentum=0.9)


def update(engine: Engine, batch: list[Tensor]) -> float:
    """One step; the engine keeps the loss as its output."""
    x, y = batch
    model.train()
    losses = rule.estimate(lambda: F.cross_entropy(model(x), y, reduction="none"))  # the loss of each sample
    clip_grad_norm_(model.parameters(), 2.0)
    rule.descend()
    return losses.mean().item()


trainer = Engine(update)
trainer.add_event_handler(Events.EPOCH_COMPLETED, LRScheduler(CosineAnnealingLR(rule, EPOCHS)))
state = trainer.run(loader, EPOCHS)
print(f"node perturbation, clipped: {accuracy(model):.1f} %, the last loss {state.output:.2f}")
