"""Trained networks for `torch.hub.load`, which needs torch alone: see docs/hub.md.

The names that it finds are the functions below.
"""

from pathlib import Path

from torch import nn

dependencies = ["torch"]

_RECORDS = Path(__file__).parent / "experiments" / "records"


def softhebb_mnist(*, pretrained: bool = True) -> nn.Sequential:
    """A small CNN for MNIST, whose two convolutions have learned without labels by `bioopt.SoftHebb`.

    Inputs are N×1×28×28, pixels from 0 to 1, white on black; outputs the scores of ten digits. Its parts are
    ``standardise``, ``trunk`` and ``readout``; ``model.trunk(model.standardise(images))`` are 784 features of each.

    Args:
        pretrained: with what it has learned (weights in half precision); ``False``: its control, random weights.
    """
    from experiments.models.pixels import unpacked

    return unpacked(_RECORDS / "mnist-cnn8-softhebb" / "weights.pt", pretrained=pretrained)


def from_run(folder: str) -> nn.Sequential:
    """The network of any run of train.py that has finished, from the run's folder; needs what train.py needs.

    Inputs, outputs and parts are as of ``softhebb_mnist``. So the larger networks of the records can be had: run the
    command of a record, then load the folder that it names.

    Args:
        folder: of the run, such as ``"runs/softhebb_cifar10"``.

    Raises:
        ValueError: it is not a finished run of image classification, or its network does not end with a Linear.
    """
    from experiments.weights import network_of

    return network_of(Path(folder))[0]
