"""Slow twins of the Hebbian rules: one synapse, one event at a time."""

from __future__ import annotations

import itertools
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

LAYERS = {
    "linear": (lambda: nn.Linear(5, 6), (4, 5)),
    "linear, no bias": (lambda: nn.Linear(5, 6, bias=False), (4, 5)),
    "linear over a sequence": (lambda: nn.Linear(5, 6), (3, 4, 5)),
    "conv1d": (lambda: nn.Conv1d(3, 4, 3, stride=2, padding=1), (2, 3, 9)),
    "conv2d, stride": (lambda: nn.Conv2d(2, 4, 3, stride=2, padding=1), (3, 2, 7, 6)),
    "conv2d, reflect": (lambda: nn.Conv2d(2, 4, 3, padding=2, padding_mode="reflect", bias=False), (2, 2, 5, 5)),
    "conv2d, groups": (lambda: nn.Conv2d(4, 6, 3, groups=2), (2, 4, 5, 5)),
    "conv2d, dilation": (lambda: nn.Conv2d(2, 4, (3, 2), dilation=(2, 1), padding=(2, 0)), (2, 2, 6, 6)),
    "conv2d, one image": (lambda: nn.Conv2d(2, 4, 3), (2, 5, 5)),
    "conv3d": (lambda: nn.Conv3d(2, 4, 2, stride=(1, 2, 1)), (2, 2, 3, 4, 3)),
}


def events(layer: nn.Module, x: Tensor) -> list[list[tuple[int, Tensor, float]]]:
    """For each event, (neuron, its presynaptic patch, its postsynaptic activity), by plain indexing."""
    weight, bias = layer.weight.detach(), layer.bias
    u = layer(x).detach()
    if isinstance(layer, nn.Linear):
        rows, us = x.reshape(-1, x.shape[-1]), u.reshape(-1, u.shape[-1])
        return [[(k, rows[n], us[n, k].item()) for k in range(len(weight))] for n in range(len(rows))]
    space = weight.ndim - 2
    if x.ndim == space + 1:
        x, u = x[None], u[None]
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    pad = [p for size in reversed(layer.padding) for p in (size, size)]
    padded = F.pad(x, pad, mode=mode)
    found = []
    ins, outs = weight.shape[1], len(weight) // layer.groups
    for sample in range(len(x)):
        for place in itertools.product(*(range(size) for size in u.shape[2:])):
            patches = []  # one a group of neurons
            for first in range(0, x.shape[1], ins):
                patch = torch.zeros_like(weight[0])
                for offset in itertools.product(*(range(size) for size in weight.shape[2:])):
                    at = tuple(
                        p * s + o * d for p, s, o, d in zip(place, layer.stride, offset, layer.dilation, strict=True)
                    )
                    patch[(slice(None), *offset)] = padded[(sample, slice(first, first + ins), *at)]
                patches.append(patch)
            event = []
            for k in range(len(weight)):
                patch, activity = patches[k // outs], u[(sample, k, *place)].item()
                assert math.isclose(
                    activity, (patch * weight[k]).sum().item() + (0 if bias is None else bias[k].item()), abs_tol=1e-9
                )
                event.append((k, patch, activity))
            found.append(event)
    return found


def hebbian_twin(
    layer: nn.Module,
    x: Tensor,
    t: float,
    lr: float,
    competition: str = "soft",
    k: int = 2,
    loser_strength: float = 0.0,
    decay: str = "subspace",
    modulator: list[float] | None = None,
) -> Tensor:
    weight = layer.weight.detach()
    pool = len(weight) // getattr(layer, "groups", 1)
    product, together = torch.zeros_like(weight), torch.zeros(len(weight), len(weight), dtype=weight.dtype)
    all_events, norms = events(layer, x), [w.norm().item() for w in weight]
    for e, event in enumerate(all_events):
        m = 1.0 if modulator is None else modulator[e * len(modulator) // len(all_events)]
        for neuron, patch, u in event:
            rivals = [(j, v) for j, _, v in event if j // pool == neuron // pool]
            ranking = sorted(rivals, key=lambda rival: -rival[1] / norms[rival[0]])
            wins = ranking[0][0] == neuron
            sharing = ranking[:k] if competition == "k" else ranking
            if competition == "none":
                share = 1.0
            elif competition == "hard":
                share = 1.0 if wins else -loser_strength / (pool - 1)
            elif neuron in [j for j, _ in sharing]:
                share = 1 / sum(math.exp(t * (v / norms[j] - u / norms[neuron])) for j, v in sharing)
                share *= 1 if wins or not loser_strength else -loser_strength
            else:
                share = 0.0
            product[neuron] += m * share * u * patch / len(all_events)
            for j, v in rivals:
                together[neuron, j] += m * share * u * v / len(all_events)
    flat = weight.flatten(1)
    if decay != "subspace":
        together = together.diag().diag() * (decay == "own")
    if decay == "none":
        return product
    change = product.flatten(1) - together @ flat
    if not loser_strength and min(modulator or [1]) >= 0:
        change = torch.linalg.inv(torch.eye(len(flat), dtype=flat.dtype) + lr * together) @ change
    for rows in (slice(first, first + pool) for first in range(0, len(weight), pool)):
        change[rows] *= min(1, flat[rows].norm() / (lr * change[rows].norm()))
    return change.view_as(weight)


def oja_twin(layer: nn.Module, x: Tensor, lr: float) -> Tensor:
    weight = layer.weight.detach()
    change, power = torch.zeros_like(weight), torch.zeros(len(weight), dtype=weight.dtype)
    all_events = events(layer, x)
    for event in all_events:
        for k, patch, u in event:
            change[k] += u * (patch - u * weight[k]) / len(all_events)
            power[k] += u * u / len(all_events)
    for k in range(len(weight)):
        change[k] /= 1 + lr * power[k]
    return change


def softhebb_twin(layer: nn.Module, x: Tensor, t: float, strongest: int | None = None) -> Tensor:
    weight = layer.weight.detach()
    pool = len(weight) // getattr(layer, "groups", 1)
    change = torch.zeros_like(weight)
    for event in events(layer, x):
        for k, patch, u in event:
            rivals = sorted((v for j, _, v in event if j // pool == k // pool), reverse=True)[:strongest]
            if u not in rivals:
                continue
            y = 1 / sum(math.exp(t * (v - u)) for v in rivals)
            y = y if u == max(rivals) else -y
            change[k] += y * (patch - u * weight[k])
    change /= change.abs().max()
    for k, w in enumerate(weight):
        change[k] *= abs(w.norm() - 1) ** 0.5
    return change


def krotov_hopfield_twin(layer: nn.Module, x: Tensor, rank: int, strength: float) -> Tensor:
    weight = layer.weight.detach()
    pool = len(weight) // getattr(layer, "groups", 1)
    change = torch.zeros_like(weight)
    for event in events(layer, x):
        for k, patch, u in event:
            place = sum(v > u for j, _, v in event if j // pool == k // pool)
            g = {0: 1.0, rank - 1: -strength}.get(place, 0.0)
            change[k] += g * (patch - u * weight[k])
    return change / change.abs().max()


def sanger_twin(layer: nn.Module, x: Tensor, lr: float) -> Tensor:
    """The decay at the new weights: neuron by neuron, since each needs those before it alone."""
    weight = layer.weight.detach()
    pool = len(weight) // getattr(layer, "groups", 1)
    all_events, new = events(layer, x), weight.clone()
    for k in range(len(weight)):
        before = range(k // pool * pool, k + 1)
        hebb, c = torch.zeros_like(weight[k]), dict.fromkeys(before, 0.0)
        for event in all_events:
            hebb += event[k][2] * event[k][1] / len(all_events)
            for j in before:
                c[j] += event[k][2] * event[j][2] / len(all_events)
        others = sum((c[j] * new[j] for j in before if j != k), torch.zeros_like(hebb))
        new[k] = (weight[k] + lr * (hebb - others)) / (1 + lr * c[k])
    return (new - weight) / lr


def anti_hebbian_twin(layer: nn.Module, x: Tensor, lr: float) -> Tensor:
    weight = layer.weight.detach()
    pool = len(weight) // getattr(layer, "groups", 1)
    all_events, change = events(layer, x), torch.zeros_like(weight)
    for event in all_events:
        for k, _, u in event:
            for j, _, v in event:
                if j != k and j // pool == k // pool:
                    change[k] -= u * v * weight[j] / len(all_events)
    for first in range(0, len(weight), pool):
        rows = slice(first, first + pool)
        change[rows] *= min(1, weight[rows].norm() / (lr * change[rows].norm()))
    return change


def bcm_twin(layer: nn.Module, x: Tensor, lr: float, threshold: list[float]) -> tuple[Tensor, list[float]]:
    weight = layer.weight.detach()
    all_events, change, power = events(layer, x), torch.zeros_like(weight), [0.0] * len(weight)
    for event in all_events:
        for k, patch, u in event:
            change[k] += u * (u - threshold[k]) / threshold[k] * patch / len(all_events)
            power[k] += u * u / len(all_events)
    for k, w in enumerate(weight):
        change[k] *= min(1, w.norm() / (lr * change[k].norm()))
    return change, power
