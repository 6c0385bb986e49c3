"""Gradient accumulation, clipping and a learning-rate schedule.

Rules of one forward pass sum over all forward passes since the last step, so micro-batches accumulate as they do with
gradients. Rules that compare losses estimate each micro-batch separately, and you add up `.grad`. (For rules that
credit no single samples, such as `WeightPerturbation`, one closure can run all micro-batches. In rules of local
objectives, whose losses are means over one pass, divide the sum of `.grad` by the number of micro-batches.) Either way
`estimate` writes `.grad` and `descend` uses it: clip in between. Clipping after `loss.backward()` would reach the
readout only.
"""

import torch
import torch.nn.functional as F
from digits import accuracy, batches, images, labels, network
from torch.nn.utils import clip_grad_norm_
from torch.optim.lr_scheduler import CosineAnnealingLR

import bioopt

EPOCHS, MICRO = 10, 16

# Rules of one forward pass: Hebbian and its family
model = network()
optimizer = bioopt.Hebbian(model)
scheduler = CosineAnnealingLR(optimizer, EPOCHS)
for _ in range(EPOCHS):
    for batch in batches():
        optimizer.zero_grad()
        for micro in batch.split(MICRO):
            loss = F.cross_entropy(model(images[micro]), labels[micro], reduction="sum") / len(batch)
            loss.backward()  # for the readout; the trunk was recorded in the forward pass
        optimizer.estimate()  # of all forward passes since the last step
        clip_grad_norm_(model.parameters(), 1.0)
        optimizer.descend()
    scheduler.step()
print(f"Hebbian: {accuracy(model):.1f} % of the unseen digits, learning rate now {optimizer.param_groups[0]['lr']:g}")

# All other rules
model = network()
params = list(model.parameters())
rule = bioopt.NodePerturbation(model, lr=0.02, sigma=0.01, relative=False, samples=4, momentum=0.9)
scheduler = CosineAnnealingLR(rule, EPOCHS)
longest = 0.0
for _ in range(EPOCHS):
    for batch in batches():
        total = [torch.zeros_like(p) for p in params]
        for micro in batch.split(MICRO):
            rule.estimate(lambda micro=micro: F.cross_entropy(model(images[micro]), labels[micro], reduction="none"))
            for sum_, p in zip(total, params, strict=True):
                sum_ += p.grad * len(micro) / len(batch)
        for sum_, p in zip(total, params, strict=True):
            p.grad = sum_
        longest = max(longest, clip_grad_norm_(params, 2.0).item())
        rule.descend()
    scheduler.step()
print(f"node perturbation: {accuracy(model):.1f} %, the largest norm of an estimate, {longest:.1f}, clipped to 2")
