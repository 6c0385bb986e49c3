"""Slow twins of the feedback rules: one sample, one synapse at a time, on plain lists of connections."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

Connection = tuple[int, int, int]  # postsynaptic neuron, presynaptic neuron, weight


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4, bias=False), nn.Tanh(), nn.Linear(4, 3))


def convolutions() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, stride=2, padding=1, groups=2), nn.Tanh(), nn.Conv2d(4, 3, 2, dilation=(2, 1)), nn.Tanh(),
        nn.Flatten(), nn.Linear(3, 3)
    )  # fmt: skip


NETWORKS: dict[str, tuple[Callable[[], nn.Sequential], tuple[int, ...]]] = {
    "mlp": (mlp, (6,)),
    "convolutions": (convolutions, (2, 5, 4)),
}


def connections(layer: Any, shape: tuple[int, ...]) -> tuple[list[Connection], tuple[int, ...]]:
    """All connections of a layer for an input of this shape, by plain indexing, and the shape of its output."""
    if isinstance(layer, nn.Linear):
        outs, ins = layer.weight.shape
        return [(o, i, o * ins + i) for o in range(outs) for i in range(ins)], (outs,)
    outs, ins, *kernel = layer.weight.shape
    _channels, *size = shape
    space = [
        (n + 2 * p - d * (k - 1) - 1) // s + 1
        for n, k, s, p, d in zip(size, kernel, layer.stride, layer.padding, layer.dilation, strict=True)
    ]
    found = []
    places = itertools.product(range(outs), *map(range, space), range(ins), *map(range, kernel))
    for k, row, column, c, a, b in places:
        i = row * layer.stride[0] - layer.padding[0] + a * layer.dilation[0]
        j = column * layer.stride[1] - layer.padding[1] + b * layer.dilation[1]
        if 0 <= i < size[0] and 0 <= j < size[1]:
            channel = k // (outs // layer.groups) * ins + c
            post, pre = (k * space[0] + row) * space[1] + column, (channel * size[0] + i) * size[1] + j
            found.append((post, pre, ((k * ins + c) * kernel[0] + a) * kernel[1] + b))
    return found, (outs, *space)


class Twin:
    """A network of lists, trained by backpropagation with other signals for the error.

    Args:
        model: whose weights it starts from.
        shape: of a sample.
        feedback: the flat feedback weights of each layer; of layer-wise rules as the weights, of direct ones outputs ×
            activity.
    """

    def __init__(self, model: nn.Sequential, shape: tuple[int, ...], feedback: list[list[float]]) -> None:
        self.layers, self.shapes = [layer for layer in model if hasattr(layer, "weight")], [shape]
        self.maps: list[list[Connection]] = []
        self.fields: list[int] = []  # postsynaptic neurons of each bias
        for layer in self.layers:
            shape = (math.prod(shape),) if isinstance(layer, nn.Linear) else shape
            found, shape = connections(layer, shape)
            self.maps.append(found)
            self.shapes.append(shape)
            self.fields.append(math.prod(shape[1:]))
        self.weights = [layer.weight.flatten().tolist() for layer in self.layers]
        self.biases = [None if layer.bias is None else layer.bias.tolist() for layer in self.layers]
        self.feedback = feedback

    def forward(self, x: list[float]) -> list[list[float]]:
        """The presynaptic activity of each layer, and the output."""
        activity = [x]
        for k, connected in enumerate(self.maps):
            u = [0.0] * math.prod(self.shapes[k + 1])
            for post, pre, w in connected:
                u[post] += self.weights[k][w] * activity[-1][pre]
            bias = self.biases[k]
            u = u if bias is None else [value + bias[i // self.fields[k]] for i, value in enumerate(u)]
            activity.append(u if k == len(self.maps) - 1 else [math.tanh(value) for value in u])
        return activity

    def step(
        self,
        x: Tensor,
        y: Tensor,
        lr: float,
        *,
        direct: bool = False,
        target: bool = False,
        centred: bool = True,
        decay: float | None = None,
    ) -> None:
        """One step of gradient descent by the mean cross-entropy.

        Args:
            x: samples.
            y: labels.
            lr: learning rate.
            direct: whether feedback comes from the output.
            target: whether the target takes the place of the error.
            centred: whether the mean target is subtracted.
            decay: of forward and feedback weights, which then learn; ``None``: feedback weights stay.
        """
        count = len(x)
        changes = [[0.0] * len(w) for w in self.weights]
        shifts = [None if b is None else [0.0] * len(b) for b in self.biases]
        returning = [[0.0] * len(b) for b in self.feedback]
        for sample, label in zip(x.flatten(1).tolist(), y.tolist(), strict=True):
            activity = self.forward(sample)
            total = sum(math.exp(v) for v in activity[-1])
            error = [(math.exp(v) / total - (i == label)) / count for i, v in enumerate(activity[-1])]
            outputs = len(error)
            mean = 1 / outputs if centred else 0.0
            signal = [-((i == label) - mean) / count for i in range(outputs)] if target else error
            delta = error
            for k in reversed(range(len(self.maps))):
                for post, pre, w in self.maps[k]:
                    changes[k][w] += delta[post] * activity[k][pre]
                shift = shifts[k]
                if shift is not None:
                    for i, value in enumerate(delta):
                        shift[i // self.fields[k]] += value
                if k == 0:
                    break
                back, width = [0.0] * len(activity[k]), len(activity[k])
                if direct:
                    for o, i in itertools.product(range(outputs), range(width)):
                        back[i] += self.feedback[k][o * width + i] * signal[o]
                        returning[k][o * width + i] += signal[o] * activity[k][i]
                else:
                    for post, pre, w in self.maps[k]:
                        back[pre] += self.feedback[k][w] * delta[post]
                delta = [b * (1 - h * h) for b, h in zip(back, activity[k], strict=True)]
        for k, weights in enumerate(self.weights):
            if decay is not None and k:
                learned = returning[k] if direct else changes[k]
                self.feedback[k] = [b - lr * (d + decay * b) for b, d in zip(self.feedback[k], learned, strict=True)]
            loss = decay or 0.0
            self.weights[k] = [w - lr * (d + loss * w) for w, d in zip(weights, changes[k], strict=True)]
            bias, shift = self.biases[k], shifts[k]
            if bias is not None and shift is not None:
                self.biases[k] = [b - lr * d for b, d in zip(bias, shift, strict=True)]

    def mirror(self, noise: list[Tensor], lr: float, decay: float) -> None:
        """Feedback weights learn from the response to noise, given for each layer but the first."""
        for k, patterns in enumerate(noise, start=1):
            events = len(patterns) * self.fields[k]
            response = [0.0] * len(self.weights[k])
            for pattern in patterns.flatten(1).tolist():
                u = [0.0] * math.prod(self.shapes[k + 1])
                for post, pre, w in self.maps[k]:
                    u[post] += self.weights[k][w] * pattern[pre]
                for post, pre, w in self.maps[k]:
                    response[w] += u[post] * pattern[pre] / events
            self.feedback[k] = [b + lr * (r - decay * b) for b, r in zip(self.feedback[k], response, strict=True)]
