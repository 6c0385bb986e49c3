"""Shared by the examples: scikit-learn's 1,797 handwritten digits, a small network, and its accuracy."""

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

images, labels = (torch.as_tensor(array) for array in load_digits(return_X_y=True))
images = images.float() / 16
order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
train, test = order[:1437], order[1437:]


def network(seed: int = 0, hidden: int = 16) -> nn.Sequential:
    """An MLP with the same initial weights at each call."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(64, hidden), nn.ReLU(), nn.Linear(hidden, 10))


def batches(size: int = 32) -> tuple[Tensor, ...]:
    """The indices of the training images in batches, in a new random order."""
    return train[torch.randperm(len(train))].split(size)


@torch.no_grad()
def accuracy(model: nn.Module, x: Tensor = images) -> float:
    """Accuracy in per cent on the digits that were not trained on."""
    model.eval()
    right = (model(x[test]).argmax(1) == labels[test]).float().mean().item()
    model.train()
    return 100 * right
