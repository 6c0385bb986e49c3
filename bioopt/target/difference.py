"""Difference target propagation: targets go down through learned inverses, whose Jacobians match the forward ones."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, TypeAlias, Unpack, final

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim import Adam

from ..core.constraints import POSITIVE, POSITIVE_INT, SEED, Constraint
from ..core.errors import require_finite, warn
from ..core.noise import NoiseSource, fill_normal_
from ..core.params import GradientOptions, Params, whole_of
from ..core.probe import Probe
from ..core.products import in_full
from ..core.recorder import Firing
from ..core.rule import Estimate, LearningRule
from ..core.sums import add_up
from ..core.synapse import Synapse
from ..feedback.weights import RandomWeights
from .blocks import Block
from .passes import Pass

__all__ = ["DifferenceTargetPropagation"]

#: evaluates the closure, with what layers receive in place of their inputs
Run: TypeAlias = Callable[[Mapping[Synapse, Tensor]], tuple[Pass, Tensor]]

AT_INPUT, AT_END = 0, 1  # of a block: where noise is added


@final
class DifferenceTargetPropagation(LearningRule):
    r"""Each layer learns from a target for its activity, which learned inverses carry down from the output.

    A block reaches from a layer to the entry of the next one, :math:`h_l = F_l(h_{l-1})`: the layer
    :math:`u_l = W_l h_{l-1} + b_l`, and what the network makes of :math:`u_l` (activation, pooling, normalisation). The
    first target is a step down the loss of each sample, at the output of the last layer; inverses :math:`G_l` carry it
    down:

    .. math::
        \hat h_L = h_L - \beta\, \frac{\partial \ell}{\partial h_L}, \qquad
        \hat h_{l-1} = h_{l-1} + G_l(\hat h_l) - G_l(h_l), \qquad
        \Delta \theta_l = \frac{1}{\beta N} \sum \frac{\partial F_l}{\partial \theta_l}^{\!\top} (\hat h_l - h_l)

    over :math:`N` samples. An inverse is the transposed layer with weights :math:`V_l` of its own, of the shape of
    :math:`W_l` (for a convolution, a transposed convolution), behind what reverses the rest of the block:

    .. math::
        G_l(h) = V_l^\top D_l^\top \varphi(h), \qquad D_l = \frac{\partial h_l}{\partial u_l},

    where :math:`\varphi` keeps targets in the range of activity that the block has in this batch (for ReLU, not below
    0; the extreme activities themselves may move on), and :math:`D_l` is taken at the forward pass: the slope of each
    neuron's activation, the winners of max pooling. Inverses never read :math:`W`. They learn from the response of a
    block to noise :math:`\varepsilon` at its input, and of the inverse to noise :math:`\eta` at its own, by descent on
    the local difference reconstruction loss

    .. math::
        -\varepsilon^\top \left( G_l(F_l(h_{l-1} + \varepsilon)) - G_l(h_l) \right)
        + \tfrac12 \lVert G_l(h_l + \eta) - G_l(h_l) \rVert^2 ,

    whose minimum for small noise is :math:`J_G = J_F^\top`, reached at :math:`V_l = W_l`. For small :math:`\beta`, the
    update is then that of backpropagation. Inverses learn once the targets of a batch are known, for the next batch.

    All parameters of the model learn, those of normalisation layers too. A chain of layers is needed: skip connections
    and branches are refused, because one inverse gives one target. A step evaluates the closure
    ``1 + feedback_steps`` times; batch statistics advance once.

    Args:
        params: the model (or modules, or groups whose ``"params"`` are modules), all of whose parameters learn. Bare
            parameters are refused.
        lr: learning rate of ``descent``, by default `torch.optim.Adam`.
        feedback_lr: rate of the inverses in [0, 2), in units of the step that minimises their loss on the batch along
            its gradient. 0: they stay random. May differ between groups.
        feedback_steps: steps of the inverses for each step of the network, with new noise each.
        noise: the deviation of :math:`\varepsilon` and :math:`\eta`, in units of the root mean square of the activity
            of the sample.
        target_step: :math:`\beta`, the length of the step to the first target.
        seed: of all that the rule draws; it is state.
        options: ``centre_inputs``, ``exclude``, ``descent`` and its options, ``process_group`` (average gradients over
            these ranks, each with its share of the batch), as in `bioopt.LearningRule`.

    Raises:
        ValueError: a hyperparameter out of range; a model without plastic layers, or with layers that have weights and
            are no known synapses.
        TypeError: bare parameters.
        RuntimeError: a step without a closure; layers that form no chain, or run twice; a loss that depends on no
            layer; a closure that runs other layers in its evaluations with noise. Layers that ran and that the loss
            does not depend on learn nothing; one warning names them.

    Sources: M. M. Ernoult, F. Normandin, A. Moudgil, S. Spinney, E. Belilovsky, I. Rish, B. Richards & Y. Bengio
    (2022), *Towards scaling difference target propagation by learning backprop targets*, ICML; difference target
    propagation: D.-H. Lee, S. Zhang, A. Fischer & Y. Bengio (2015), *Difference target propagation*, ECML PKDD.
    """

    constraints: ClassVar[dict[str, Constraint]] = {
        "feedback_lr": (lambda v: 0 <= v < 2, "a number in [0, 2)"),
    }
    splits_batch = True
    centres_inputs = True

    def __init__(
        self,
        params: Params,
        lr: float = 2e-3,  # η
        *,
        feedback_lr: float = 0.1,
        feedback_steps: int = 4,  # K
        noise: float = 0.1,  # σ
        target_step: float = 0.1,  # β
        seed: int = 0,
        **options: Unpack[GradientOptions],
    ) -> None:
        for option, value, constraint in (
            ("feedback_steps", feedback_steps, POSITIVE_INT),
            ("noise", noise, POSITIVE),
            ("target_step", target_step, POSITIVE),
            ("seed", seed, SEED),
        ):
            self._check_value(option, value, constraint)
        why = "the last layer learns from the first target, by the exact gradient of its own weights"
        self._refuse_readout(options, why)
        options.setdefault("descent", Adam)
        self.feedback_steps, self.noise, self.target_step = feedback_steps, noise, target_step
        self._random, self._noise = RandomWeights(), NoiseSource()
        self._now: Pass | None = None
        self._warned = False
        super().__init__(params, {"lr": lr, "feedback_lr": feedback_lr}, **options)
        self._own_state = {"seed": seed, "step": 0, "feedback": {}}

    # -- inverses -----------------------------------------------------------------------------------------------

    @torch.no_grad()
    def feedback_weights(self) -> dict[str, Tensor]:
        """The weights of each layer's inverse by the name of the layer, of the shape of its weights, as copies.

        Those of the first layer are not used where nothing learns below it.
        """
        return {name: self._inverse(synapse).clone() for name, synapse in self.layers().items()}

    def _inverse(self, synapse: Synapse) -> Tensor:
        """The state, once it has learned; before that, random weights that keep the length of an error on average."""
        learned: dict[int, Tensor] = self._own_state["feedback"]
        weight = synapse.weight
        if synapse.index in learned:
            return learned[synapse.index].to(weight.device)  # a checkpoint may have left it elsewhere
        deviation = 1 / math.sqrt(max(weight[0].numel(), 1))
        return self._random.fixed(synapse, weight, weight.shape, deviation, self._own_state["seed"])

    # -- one evaluation -----------------------------------------------------------------------------------------

    def _select(self, group: dict[str, Any]) -> tuple[list[Any], list[Synapse]]:
        return whole_of(type(self).__name__, group["params"], self._exclusion)

    def _enter(self, synapse: Synapse, x: Tensor) -> Tensor:
        assert self._now is not None
        return self._now.enter(synapse, x)

    def _leave(self, firing: Firing, u: Tensor) -> Tensor:
        assert self._now is not None
        return self._now.leave(firing, u)

    def _estimate(self, probe: Probe) -> Estimate:
        self._recorder.reset()
        self._undo.append(self._forget)
        params = self._of_model()

        def run(given: Mapping[Synapse, Tensor]) -> tuple[Pass, Tensor]:
            for p in params:
                p.grad = None
            self._now = one = Pass(type(self).__name__, given)
            losses = probe(grad=True)
            self._samples = losses.numel()
            one.send_back(losses, params)
            return one, losses.detach()

        with self._recorder.acting(self._enter, self._leave):
            forward, losses = run({})
            if not forward.links:
                raise RuntimeError(self._coverage.none_fired())
            grads = {p: p.grad for p in params if p.grad is not None}  # above the output
            blocks = self._blocks(forward)
            with _without_autocast(blocks):
                add_up(grads, self._taught(blocks, params).items())
            silent = self._silent()  # they passed targets on without one of their own
            grads = {p: g for p, g in grads.items() if p not in silent}
            self._average_gradients(losses, grads)
            state = self._next_state()
            state["feedback"] = {**state["feedback"], **self._learned_inverses(forward, blocks, run)}
        return losses, grads, state

    def _forget(self) -> None:
        """Drop the graphs of the last evaluation."""
        self._now = None

    def _blocks(self, forward: Pass) -> list[Block]:
        """The blocks from the output down, with the range of their activity over all ranks."""
        chain = forward.chain()
        lost = [synapse.name for synapse, link in forward.links.items() if link not in chain]
        if lost and not self._warned:
            self._warned = True
            warn(
                f"{type(self).__name__}: layers ran and learn nothing: {', '.join(map(repr, lost))}. The loss does not "
                "depend on their activity by a graph; exclude=[...] leaves layers out without this warning"
            )
        blocks = [Block(link, above) for link, above in zip(chain, [None, *chain[:-1]], strict=True)]
        bounds = torch.stack([bound for block in blocks[1:] for bound in block.bounds]) if blocks[1:] else None
        if bounds is not None and self.process_group is not None:
            dist.all_reduce(bounds, dist.ReduceOp.MAX, group=self.process_group)
        for i, block in enumerate(blocks[1:]):
            assert bounds is not None
            block.bounds = (bounds[2 * i], bounds[2 * i + 1])
        return blocks

    # -- targets ------------------------------------------------------------------------------------------------

    def _taught(self, blocks: Sequence[Block], params: Sequence[Tensor]) -> dict[Tensor, Tensor]:
        """The gradient of each parameter towards the target of its block."""
        top = blocks[0].link
        assert top.leaf.grad is not None
        error = in_full(top.leaf.grad.detach())
        step = self.target_step * top.synapse.samples(top.u)  # the loss is a mean over samples
        ends, signals, change = [top.u], [error], error * -step
        for block, below in zip(blocks, [*blocks[1:], None], strict=True):
            if not block.link.x.requires_grad:  # nothing learns below
                break
            back = block.reversed(block.limited(change))
            change = block.transposed(self._inverse(block.link.synapse), back)
            ends.append(block.link.x)
            signals.append(change / -step)
            if below is not None:
                ends.append(below.link.u)
                signals.append(below.reversed(signals[-1]))
        signals = [signal.to(end.dtype) for signal, end in zip(signals, ends, strict=True)]
        found = torch.autograd.grad(ends, params, signals, retain_graph=True, allow_unused=True)
        return {p: g for p, g in zip(params, found, strict=True) if g is not None}

    # -- learning of inverses -----------------------------------------------------------------------------------

    def _learned_inverses(self, forward: Pass, blocks: Sequence[Block], run: Run) -> dict[int, Tensor]:
        """The weights of inverses after their steps, by the index of their layer."""
        learning = [block for block in blocks if block.link.x.requires_grad and self._rate(block) > 0]
        weights = {block: self._inverse(block.link.synapse) for block in learning}
        for k in range(self.feedback_steps if learning else 0):
            xi = {block: self._drawn(block, block.x, k, AT_INPUT) for block in learning}
            noisy, _ = run(
                {
                    block.link.synapse: (block.x + self.noise * block.scale_of_x * xi[block]).to(block.link.x.dtype)
                    for block in learning
                }
            )
            if missing := [block.link.synapse.name for block in blocks if block.link.synapse not in noisy.links]:
                raise RuntimeError(
                    f"{type(self).__name__}: in an evaluation with noise, the closure did not run the layers "
                    f"{', '.join(missing)} of the first: it must run the same layers each time"
                )
            self._now = forward  # whose layers activation checkpointing runs again
            with _without_autocast(blocks):
                self._step_of_inverses(learning, weights, xi, noisy, k)
        require_finite(self, "an inverse", [*weights.values()])
        return {block.link.synapse.index: weight for block, weight in weights.items()}

    def _step_of_inverses(
        self,
        blocks: Sequence[Block],
        weights: dict[Block, Tensor],
        xi: Mapping[Block, Tensor],
        noisy: Pass,
        k: int,
    ) -> None:
        """Descend the local difference reconstruction loss, of noise of deviation 1, for all inverses.

        Args:
            blocks: whose inverses learn.
            weights: of the inverses; replaced.
            xi: the noise at the inputs of blocks, in units of its deviation.
            noisy: the evaluation with this noise.
            k: the number of the step.
        """
        slopes, responses = [], []
        for block in blocks:
            change = block.limited(block.end_in(noisy) - block.h) / (self.noise * block.scale_of_x)
            deviation = self.noise * block.scale_of_h
            eta = self._drawn(block, block.h, k, AT_END)
            response = block.reversed(block.limited(deviation * eta) / deviation)
            returned = block.transposed(weights[block], response)
            slopes.append(block.product(returned, response) - block.product(xi[block], block.reversed(change)))
            responses.append(response)
        self._average_over_ranks(slopes)
        curvatures = [
            block.transposed(slope, response).square().sum()
            for block, slope, response in zip(blocks, slopes, responses, strict=True)
        ]
        self._average_over_ranks(curvatures)
        for block, slope, curvature in zip(blocks, slopes, curvatures, strict=True):
            # Where a quadratic loss is lowest along its gradient.
            step = torch.where(curvature > 0, slope.square().sum() / curvature, torch.zeros_like(curvature))
            weights[block] = weights[block] - self._rate(block) * step.to(slope.dtype) * slope

    def _rate(self, block: Block) -> float:
        return float(self.param_groups[block.link.synapse.group]["feedback_lr"])

    def _drawn(self, block: Block, like: Tensor, k: int, where: int) -> Tensor:
        """Standard normal numbers, others on each rank."""
        counts = (block.link.synapse.index, self._own_state["step"], k, where, self._ranks[0])
        generator = self._noise.stream(like.device, self._own_state["seed"], *counts)
        return fill_normal_(torch.empty_like(like), generator)


def _without_autocast(blocks: Sequence[Block]) -> torch.autocast:
    """Small differences of activities would be rounded away."""
    return torch.autocast(blocks[0].h.device.type, enabled=False)
