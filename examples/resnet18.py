"""One rule per part: torchvision's ResNet-18, with a Hebbian first convolution and the rest trained by gradients.

Hebbian layers let no gradient pass, so layers that learn by gradients must come after them (or be on a parallel
residual path); otherwise `Mixed` raises an error at the first step. Here only the image comes before.
"""

import torch
import torch.nn.functional as F
from digits import accuracy, batches, images, labels
from torchvision.models import resnet18

import bioopt

x = F.interpolate(images.view(-1, 1, 8, 8), 16, mode="bilinear").expand(-1, 3, -1, -1)

torch.manual_seed(0)
model = resnet18(num_classes=10)
rest = [p for name, p in model.named_parameters() if name != "conv1.weight"]
optimizer = bioopt.Mixed(
    bioopt.Hebbian(model.conv1, readout=None),  # no readout: its only layer is a hidden one
    torch.optim.Adam(rest, lr=1e-3, fused=True),
)
trained_by = optimizer.coverage(model)
before, filters = accuracy(model, x), model.conv1.weight.detach().clone()

for batch in batches():
    optimizer.zero_grad()
    F.cross_entropy(model(x[batch]), labels[batch]).backward()
    optimizer.step()

similarity = F.cosine_similarity(model.conv1.weight.flatten(1), filters.flatten(1))
print(f"conv1 by {trained_by['conv1.weight']}, the rest by {trained_by['fc.weight']}")
print(f"before: {before:.1f} % of the unseen digits, after one epoch: {accuracy(model, x):.1f} %")
print(f"filters of conv1 turned without a gradient by {similarity.acos().rad2deg().mean():.0f} degrees on average")
