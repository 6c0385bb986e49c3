"""The likelihood of a Boltzmann machine, by annealed importance sampling, and samples from it."""

from __future__ import annotations

import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bioopt.nn import RBM
from bioopt.nn.rbm import bernoulli

from . import data, pictures


@torch.no_grad()
def log_partition(
    rbm: RBM, base: Tensor, inverse_temperatures: Tensor, chains: int, generator: torch.Generator
) -> tuple[float, float]:
    r"""``log Z`` of a machine by annealed importance sampling, and its standard error.

    Chains go from a machine without weights, whose visible units are on with the probabilities ``base``, through
    :math:`p_\beta(v) \propto p_0(v)^{1-\beta} p(v)^\beta` to the machine itself (R. Salakhutdinov & I. Murray, 2008,
    *On the quantitative analysis of deep belief networks*, whose base-rate machine and transitions these are).

    Args:
        rbm: the machine.
        base: probabilities of the visible units, between 0 and 1.
        inverse_temperatures: :math:`\beta` rising from 0 to 1.
        chains: how many independent runs.
        generator: of the draws.
    """
    weight, hidden, visible = rbm.synapse.weight, rbm.synapse.bias, rbm.visible_bias
    bias = torch.logit(base)
    v = bernoulli(base.expand(chains, -1), generator)
    log_weights = torch.zeros(chains, dtype=torch.float64, device=base.device)
    betas = inverse_temperatures.tolist()
    for colder, beta in pairwise(betas):
        u = F.linear(v, weight, hidden)
        # log p*_β(v) - log p*_β'(v); hidden units without weights count alike in both
        log_weights += (beta - colder) * (v @ (visible - bias)) + (F.softplus(beta * u) - F.softplus(colder * u)).sum(1)
        h = drawn(beta * u, generator)
        v = drawn((1 - beta) * bias + beta * F.linear(h, weight.T, visible), generator)
    log_base = F.softplus(bias.double()).sum() + len(hidden) * math.log(2)
    log_mean = log_weights.logsumexp(0) - math.log(chains)
    relative = (log_weights - log_mean).exp()  # of mean 1
    return (log_base + log_mean).item(), (relative.std() / math.sqrt(chains)).item()


def drawn(log_odds: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Binary units, each 1 with the probability of its log-odds."""
    return bernoulli(torch.sigmoid(log_odds), generator)


def published_temperatures(device: torch.device) -> Tensor:
    """The 14,500 inverse temperatures of Salakhutdinov & Murray (2008)."""
    parts = [(0.0, 0.5, 500), (0.5, 0.9, 4000), (0.9, 1.0, 10_000)]
    steps = [torch.linspace(a, b, count + 1, dtype=torch.float64)[:-1] for a, b, count in parts]
    return torch.cat([*steps, torch.ones(1, dtype=torch.float64)]).to(device)


@torch.no_grad()
def likelihood(
    model: nn.Module, images: data.Images, title: str, folder: Path, *, chains: int, gibbs_steps: int, seed: int
) -> tuple[dict[str, Any], list[Path]]:
    """The log-likelihood of the first machine in a sequential model, in nats per image, and samples from it.

    Images are made binary as in its training: each pixel is 1 with its grey level as the probability, drawn once by
    ``seed``. The standard error combines that of ``log Z`` and that of the mean over test images.

    Args:
        model: layers that turn images into grey levels, and an RBM on them.
        images: the data.
        title: of the run.
        folder: where to write.
        chains: of annealed importance sampling.
        gibbs_steps: from noise to the samples that are shown.
        seed: of all draws.
    """
    model.eval()
    generator = torch.Generator(images.test_labels.device).manual_seed(seed)
    before, rbm = _first_machine(model)

    def binary(some: Tensor) -> Tensor:
        grey = torch.cat([before(images.prepare(part)) for part in torch.split(some, 1000)])
        return bernoulli(grey, generator)

    test = binary(images.test_images)
    train = binary(images.train_images[: len(test)])
    base = (train.sum(0) + 1) / (len(train) + 2)  # between 0 and 1, never either
    temperatures = published_temperatures(base.device)
    log_z, error = log_partition(rbm, base, temperatures, chains, generator)
    log_p, log_p_train = (-rbm.free_energy(v).double() - log_z for v in (test, train))
    numbers = {
        "log_likelihood": log_p.mean().item(),
        "log_likelihood_standard_error": math.hypot(error, log_p.std().item() / math.sqrt(len(test))),
        "train_log_likelihood": log_p_train.mean().item(),
        "log_z": log_z,
        "log_z_standard_error": error,
    }
    noise = (torch.rand(100, test.shape[1], generator=generator, device=base.device) < 0.5).float()
    samples = rbm.visible_given(rbm.sample_hidden(rbm.gibbs(noise, gibbs_steps - 1, generator), generator))
    print(
        f"log-likelihood of the test images {numbers['log_likelihood']:.2f} ± "
        f"{numbers['log_likelihood_standard_error']:.2f} nats (training images {log_p_train.mean():.2f})",
        flush=True,
    )
    figure, (left, right) = plt.subplots(1, 2, figsize=(8, 4.4), layout="constrained")
    figure.suptitle(title, fontsize=10)
    for axes, shown, name in (
        (left, test[:100], "test images, each pixel drawn"),
        (right, samples, f"samples after {gibbs_steps:,} Gibbs steps from noise"),
    ):
        axes.imshow(pictures.mosaic(shown, images.shape, 10), cmap="Greys", vmin=0, vmax=1)
        axes.set_title(name, fontsize=9)
        axes.axis("off")
    return numbers, [pictures.saved(figure, folder / "samples.png")]


def _first_machine(model: nn.Module) -> tuple[nn.Sequential, RBM]:
    for i, layer in enumerate(model.children()):
        if isinstance(layer, RBM) and isinstance(model, nn.Sequential):
            return model[:i], layer
    raise ValueError("final_analysis=likelihood needs a sequential model with an RBM in it: model=rbm")
