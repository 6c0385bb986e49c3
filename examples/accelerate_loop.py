"""Hugging Face accelerate: `prepare` accepts a rule like any optimizer.

Rules of one forward pass work in accelerate's usual loop, including accumulation. For the others, call
`optimizer.optimizer.estimate(closure)` in place of `accelerator.backward(loss)`: it returns the loss of each sample,
and clipping and `optimizer.step()` then use the rule's own update. (`optimizer.step(closure)` works too, but
accelerate's wrapper returns None in place of the loss.) With several processes, give the rule `process_group=` and
leave the model out of `prepare`, which would wrap it in DistributedDataParallel. Mixed precision: "bf16"; "fp16" adds a
GradScaler, which works only with rules of one forward pass.
"""

import torch.nn.functional as F
from accelerate import Accelerator
from digits import accuracy, images, labels, network, train
from torch.optim.lr_scheduler import CosineAnnealingLR
from torch.utils.data import DataLoader, TensorDataset

import bioopt

EPOCHS = 10
accelerator = Accelerator(cpu=True, mixed_precision="bf16", gradient_accumulation_steps=2)
loader = accelerator.prepare(DataLoader(TensorDataset(images[train], labels[train]), batch_size=16, shuffle=True))

model = network()
print(f"before training: {accuracy(model):.1f} % of the unseen digits")

# Rules of one forward pass: Hebbian and its family
rule = bioopt.Hebbian(model)
model, optimizer = accelerator.prepare(model, rule)
for _ in range(EPOCHS):
    for x, y in loader:
        with accelerator.accumulate(model):
            accelerator.backward(F.cross_entropy(model(x), y))
            optimizer.step()  # of all forward passes since the last step
            optimizer.zero_grad()
print(f"Hebbian, accumulated: {accuracy(model):.1f} %")

# All other rules
model = network()
rule = bioopt.NodePerturbation(model, lr=0.01, sigma=0.01, relative=False, samples=4, momentum=0.9)
model, optimizer, scheduler = accelerator.prepare(model, rule, CosineAnnealingLR(rule, EPOCHS * len(loader)))
for _ in range(EPOCHS):
    for x, y in loader:
        # In place of accelerator.backward(loss); each sample's own loss.
        losses = optimizer.optimizer.estimate(lambda x=x, y=y: F.cross_entropy(model(x), y, reduction="none"))
        accelerator.clip_grad_norm_(model.parameters(), 2.0)
        optimizer.step()
        scheduler.step()
print(f"node perturbation, clipped: {accuracy(model):.1f} %, the last loss {losses.mean():.2f}")
