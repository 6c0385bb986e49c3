"""`ForwardForward`: each layer tells inputs with their label from inputs with another one."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, ClassVar, Unpack, final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..core.acts import detached
from ..core.constraints import POSITIVE, Constraint, one_of
from ..core.noise import NoiseSource
from ..core.params import Params
from ..core.probe import Probe, keeping_modes
from ..core.products import in_full
from ..core.rule import Estimate
from ..core.synapse import Synapse
from .blocks import Block
from .gradient import LocalGradientRule
from .heads import BlockOptions

__all__ = ["ForwardForward"]

WAVELENGTH = 4.0  # pixels, of the pattern that marks the label of an image
CONTRAST = 0.15  # of that pattern, in units of the range of the image
CODE = 8.0  # the size of a one-hot code, in units of the range of the sample


@final
class ForwardForward(LocalGradientRule):
    r"""Each layer is active for inputs that carry their own label, and quiet for those that carry another one.

    A step has a pass of positive inputs, which carry their label, and one of negative inputs, which carry a wrong one.
    With the activity :math:`h` of a block with :math:`n` neurons, and its *goodness* :math:`g`, the mean of
    :math:`h^2` over neurons and positions,

    .. math::
        L = \mathrm{softplus}(n (\theta - g^+)) + \mathrm{softplus}(n (g^- - \theta)) .

    The next layer receives :math:`h / \sqrt{g}`, so that it cannot read the goodness from the length of its input, but
    must find it in the pattern. A third, ordinary pass trains the readout, by the loss: on standardised activity, since
    the layers learn nothing in this pass that would suit a readout. A class can also be told without it, by goodness:
    it is the label for which the layers are most active.

    An input that enters a Linear layer carries its label as a one-hot code in its first values. An image or a sequence
    that enters a convolution carries it as a wave over all positions, whose direction (or length, of a sequence) is
    that of the label.

    On convolutions it does not rise above a random trunk: filters are spent on the wave, which ordinary images do not
    have. Before batch norm it ends below one, since each pass is then normalised by itself, and goodness hardly differs
    between them.

    Args:
        params: as in `BlockRule`.
        lr: learning rate of ``descent``, by default `torch.optim.Adam`.
        threshold: :math:`\theta` > 0. Neurons with tanh need one well below 1.
        label_scale: the size of the label in the input, in units of its default: 8 times the range of the sample for a
            one-hot code, 0.15 times for a wave. `predict` by goodness is better with larger ones.
        negatives: ``"label"``, or a function of inputs of the first layer and their labels that returns negative
            inputs. With a function, inputs carry no label, goodness predicts none, and `target` may be missing (the
            function gets ``None``). ``lambda x, y: (x + x.roll(1, 0)) / 2`` contrasts each input with a mixture, as
            self-contrastive Forward-Forward does, without labels.
        prediction: what `predict`, and with it ``train.py``, tells a class by: ``"readout"``, or ``"goodness"``.
        readout: ``"delta"``, or ``None``: by ``descent``, as the blocks; as in `BlockRule`.
        options: further options of the readout, ``blocks``, ``classes``, ``exclude``, ``descent`` and its options,
            ``process_group``, and ``seed``, of the wrong labels, as in `BlockRule`.

    Attributes:
        target: the labels, as in `BlockRule`.

    Sources: G. Hinton (2022), *The forward-forward algorithm: some preliminary investigations*, arXiv:2212.13345;
    labels as waves: R. Scodellaro, A. Kulkarni, F. Alves & M. Schröter (2023), *Training convolutional neural networks
    with the Forward-Forward algorithm*, arXiv:2312.14924; mixtures: X. Chen, D. Liu, J. Laydevant & J. Grollier (2025),
    *Self-Contrastive Forward-Forward algorithm*, Nature Communications 16.
    """

    constraints: ClassVar[dict[str, Constraint]] = {"threshold": POSITIVE}

    def __init__(
        self,
        params: Params,
        lr: float = 5e-4,
        *,
        threshold: float = 0.3,  # θ
        label_scale: float = 1.0,
        negatives: str | Callable[[Tensor, Tensor | None], Tensor] = "label",
        prediction: str = "readout",
        readout: str | None = "delta",
        **options: Unpack[BlockOptions],
    ) -> None:
        if negatives != "label" and not callable(negatives):
            raise ValueError(
                f"ForwardForward: negatives={negatives!r} must be 'label', or a function of inputs and labels"
            )
        self._check_value("label_scale", label_scale, POSITIVE)
        self._check_value("prediction", prediction, one_of("readout", "goodness"))
        if prediction == "goodness" and callable(negatives):
            raise ValueError(
                "ForwardForward: prediction='goodness' needs negatives='label', since inputs carry no others"
            )
        self.prediction = prediction
        self.negatives, self.label_scale = negatives, label_scale
        self.needs_target = negatives == "label"
        self._other: Tensor | None = None  # labels of the negative inputs
        self._noise = NoiseSource()
        super().__init__(params, lr, own={"threshold": threshold}, readout=readout, **options)
        if self.number_of_classes < 2:
            raise ValueError("ForwardForward: with classes=1 no input carries a wrong label; it needs at least 2")
        self._own_state = {"step": 0}
        self._recorder.act(self._receive, self._leave)

    # `_phase`: 1 in the pass of positive inputs, -1 in that of negative ones

    def local_loss(self, block: Block, h: Tensor, channel_dim: int) -> Tensor | None:
        """Of positive or of negative inputs; in the ordinary pass, blocks learn nothing."""
        if not self._phase:
            return None
        threshold, neurons = self.param_groups[block.synapses[0].group]["threshold"], h.shape[channel_dim]
        return F.softplus(self._phase * neurons * (threshold - goodness(h))).mean()

    def _in_place_of(self, x: Tensor, synapse: Synapse, hidden: bool) -> Tensor:
        """Inputs carry labels, or are negative ones of the user's own; activity is normalised."""
        if hidden:
            return normalised(x)
        if self._phase > 0:
            return x if callable(self.negatives) else self._with_label(x, self.labels(x), synapse)
        if not callable(self.negatives):
            return self._with_label(x, self._wrong_labels(x), synapse)
        negative = self.negatives(x, None if self.target is None else self.labels(x))
        if negative.shape != x.shape:
            raise ValueError(
                f"ForwardForward: negatives= returned inputs of shape {tuple(negative.shape)} for inputs of shape "
                f"{tuple(x.shape)}; it must return others of the same shape"
            )
        if torch.equal(negative, x):
            raise ValueError("ForwardForward: negatives= returned the positive inputs themselves; they must differ")
        return negative

    def _wrong_labels(self, x: Tensor) -> Tensor:
        y = self.labels(x)
        if self._other is None or len(self._other) != len(y):
            step, rank = self._own_state["step"], self._ranks[0]
            generator = self._noise.stream(y.device, self.seed, step, rank)
            shift = torch.randint(1, self.number_of_classes, y.shape, generator=generator, device=y.device)
            self._other = (y + shift) % self.number_of_classes
        return self._other

    def _with_label(self, x: Tensor, labels: Tensor, synapse: Synapse) -> Tensor:
        """Inputs that carry labels."""
        low, high = x.flatten(1).amin(1), x.flatten(1).amax(1)
        classes, size = self.number_of_classes, self.label_scale
        if synapse.channel_dim == -1:
            if x.shape[-1] < classes:
                raise RuntimeError(
                    f"ForwardForward: the input of layer '{synapse.name}' has {x.shape[-1]} values, which cannot carry "
                    f"{classes} classes: it needs at least as many"
                )
            hot = F.one_hot(labels, classes).to(x.dtype)
            shape = (-1, *[1] * (x.ndim - 2), classes)
            code = torch.lerp(low.unsqueeze(1), high.unsqueeze(1), CODE * size * hot).view(shape)
            return torch.cat([code.expand(*x.shape[:-1], classes), x[..., classes:]], -1)
        positions = x.ndim + synapse.channel_dim + 1
        angle = math.pi * labels.to(x.dtype) / classes
        axes = [torch.arange(n, device=x.device, dtype=x.dtype) for n in x.shape[positions:]]
        if len(axes) == 1:
            phase = (1 + angle).unsqueeze(1) * axes[0] / WAVELENGTH
        else:
            grid = torch.meshgrid(*axes[-2:], indexing="ij")
            along = (
                g.unsqueeze(0) * f(angle).view(-1, 1, 1) for g, f in zip(grid, (torch.cos, torch.sin), strict=True)
            )
            phase = 2 * math.pi / WAVELENGTH * sum(along, torch.zeros((), device=x.device))
        wave = phase.cos().view(len(x), *[1] * (x.ndim - phase.ndim), *phase.shape[1:])
        scale = (CONTRAST * size * (high - low)).view(-1, *[1] * (x.ndim - 1))
        return x + scale * wave

    def _estimate(self, probe: Probe) -> Estimate:
        try:
            return self._in_passes(probe, [1, -1])
        finally:
            self._other = None

    # -- prediction ---------------------------------------------------------------------------------------------

    @torch.no_grad()
    def predict(self, inputs: Any) -> Tensor:
        """The scores of each class for each sample, N × classes, in evaluation mode.

        With ``prediction="readout"``, the output of the model; with ``"goodness"``, how active its blocks are for
        inputs that carry the label of the class.

        Args:
            inputs: of the model.
        """
        if len(self._modules) != 1:
            raise RuntimeError("ForwardForward: predict() needs a rule that was given the model, not parts of it")
        model = self._modules[0][1]
        with keeping_modes(model):
            model.eval()
            scores: Tensor = model(inputs) if self.prediction == "readout" else self._goodness_of_classes(model, inputs)
            return scores

    def _goodness_of_classes(self, model: nn.Module, inputs: Any) -> Tensor:
        scores: list[Tensor] = []
        seen: set[Any] = set()

        def receive(synapse: Synapse, x: Tensor) -> Tensor:
            behind = self._gates_behind(x)
            if not behind.open:
                return self._with_label(x, torch.full((len(x),), len(scores) - 1, device=x.device), synapse)
            if not seen.issuperset(behind.open):
                seen.update(behind.open)
                scores[-1] = scores[-1] + goodness(x.detach())
            return normalised(detached(x))

        recorder = self._recorder
        recorder.in_evaluation = True
        try:
            for _ in range(self.number_of_classes):
                scores.append(torch.zeros(()))
                seen.clear()
                with recorder.acting(receive, self._leave), torch.enable_grad():  # gates tell where a block ends
                    model(inputs)
        finally:
            recorder.in_evaluation = False
        return torch.stack(scores, 1)


def goodness(h: Tensor) -> Tensor:
    """The mean square of each sample's activity, in single precision at least."""
    return in_full(h).square().flatten(1).mean(1)


def normalised(x: Tensor) -> Tensor:
    """Activity with a mean square of 1."""
    return x / (goodness(x).sqrt() + 1e-8).to(x.dtype).view(-1, *[1] * (x.ndim - 1))
