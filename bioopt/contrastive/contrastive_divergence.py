"""Contrastive divergence, for restricted Boltzmann machines."""

from __future__ import annotations

from typing import Any, ClassVar, Unpack, final

import torch
from torch import Tensor, nn

from ..core.constraints import POSITIVE_INT, SEED, Constraint
from ..core.local_product import LocalRule, means
from ..core.noise import NoiseSource
from ..core.params import Params, named_modules_of
from ..core.readout import ReadoutOptions
from ..core.recorder import Firing
from ..core.sums import Sums, product_sums
from ..core.synapse import Synapse
from ..nn.rbm import RBM, bernoulli

__all__ = ["ContrastiveDivergence"]


@final
class ContrastiveDivergence(LocalRule):
    r"""Hebbian learning from the data, anti-Hebbian learning from the machine's own samples.

    .. math::
        \Delta W = \langle h\,v^\top \rangle_\text{data} - \langle h\,v^\top \rangle_\text{model}, \qquad
        \Delta b = \langle v \rangle_\text{data} - \langle v \rangle_\text{model}, \qquad
        \Delta c = \langle h \rangle_\text{data} - \langle h \rangle_\text{model}

    for every `bioopt.nn.RBM` in the model, with visible units :math:`v`, the probabilities :math:`h = p(h=1 \mid v)` of
    its hidden units, weights :math:`W` (hidden × visible) and biases :math:`b`, :math:`c`. The first mean is over the
    inputs of the machine since the last step; a synapse uses only the activity of its two units, in two phases. If the
    second mean were over the machine's own distribution, this would be the gradient of the mean log-likelihood
    :math:`\log p(v)`. It is over samples instead, from ``steps`` Gibbs steps:

    - starting at the data (CD-k): short chains stay close to the data, so that the update is biased, with little noise;
    - ``persistent``: continuing ``chains`` chains of the machine from the last step (PCD), which are independent of the
      data and, for a small ``lr``, follow the machine's distribution as it changes.

    Samples of :math:`v` are binary, and means use the probabilities of :math:`h`, which has less noise and no bias:
    with long chains the update is the exact gradient. (Hinton's guide also allows probabilities in place of the last
    :math:`v`, which is not exact.) No loss is needed; in a stack of machines, a deep belief net, each learns from the
    hidden units of the one below.

    Args:
        params: the model (or modules, or groups whose ``"params"`` are modules), with at least one RBM inside. Bare
            parameters are refused. Weights and both biases of each RBM and the readout learn; all else is frozen.
        lr: learning rate, per mean sample.
        steps: :math:`k`, the Gibbs steps of a chain per learning step.
        persistent: whether chains continue from step to step.
        chains: the number of persistent chains. They start at random bits, and are state.
        seed: of all sampling, which does not touch the global random state.
        readout: ``None``, ``"delta"`` or ``"teacher"``, as in `LocalRule`: how the last layer learns, if it is no RBM.
        options: further options of the readout, ``descent``, its options (``momentum``, ``weight_decay``) and
            ``process_group``, as in `LocalRule`. Each rank has its share of the data with its own noise; persistent
            chains are the same on all ranks.

    Raises:
        ValueError: a hyperparameter out of range; a model without an RBM; as `LocalRule`.

    Sources: G. E. Hinton (2002), *Training products of experts by minimizing contrastive divergence*; T. Tieleman
    (2008), *Training restricted Boltzmann machines using approximations to the likelihood gradient*; G. Hinton (2010),
    *A practical guide to training restricted Boltzmann machines*.

    Example::

        rbm = bioopt.nn.RBM(784, 500)
        optimizer = bioopt.ContrastiveDivergence(rbm, lr=0.05)
        for v in batches:  # N×784, in [0, 1]
            rbm(v)
            optimizer.step()
    """

    constraints: ClassVar[dict[str, Constraint]] = {"steps": POSITIVE_INT}

    def __init__(
        self,
        params: Params,
        lr: float = 0.05,  # ε
        *,
        steps: int = 1,  # k
        persistent: bool = False,
        chains: int = 100,
        seed: int = 0,
        readout: str | None = None,
        **options: Unpack[ReadoutOptions],
    ) -> None:
        if not isinstance(persistent, bool):
            raise ValueError(f"ContrastiveDivergence: persistent={persistent!r} must be True or False")
        self._check_value("chains", chains, POSITIVE_INT)
        self._check_value("seed", seed, SEED)
        self.persistent, self.chains = persistent, chains
        self._rbms: dict[nn.Module, RBM] = {}
        self._noise = NoiseSource()
        self._firings = 0  # since the last step
        super().__init__(params, lr, readout=readout, own={"steps": steps}, **options)
        self._own_state = {"seed": seed, "step": 0, "chains": {}}

    def trained(self, synapses: list[Synapse], group: dict[str, Any]) -> list[tuple[Synapse, list[tuple[str, Tensor]]]]:
        """The synapses of RBMs, with their weights and both biases."""
        inside: dict[nn.Module, RBM] = {
            machine.synapse: machine
            for _, module in named_modules_of(group["params"])
            for machine in module.modules()
            if isinstance(machine, RBM)
        }
        for name in (s.name for s in self._readout.layers.values() if s.layer in inside):
            raise ValueError(
                f"ContrastiveDivergence: the last layer, '{name}', belongs to an RBM, and would learn as "
                "a readout: write readout=None, or put a Linear after it"
            )
        synapses = [s for s in synapses if s.layer in inside]
        if not synapses:
            raise ValueError(
                "ContrastiveDivergence: the model has no bioopt.nn.RBM that is not frozen, and nothing else learns by "
                "this rule. Add one, bioopt.nn.RBM(visible, hidden), or choose another rule"
            )
        chosen: list[tuple[Synapse, list[tuple[str, Tensor]]]] = []
        for synapse in synapses:
            self._rbms[synapse.layer] = machine = inside[synapse.layer]
            named: list[tuple[str, Tensor]] = [*synapse.named_parameters()]
            if machine.visible_bias.requires_grad and machine.visible_bias not in self._exclusion.params:
                named.append((synapse.name.removesuffix("synapse") + "visible_bias", machine.visible_bias))
            chosen.append((synapse, named))
        return chosen

    def reset(self) -> None:
        """Restart the count of firings, which determines the noise."""
        self._firings = 0

    def measure(self, firing: Firing, u: Tensor) -> Sums:
        """The sums over data, minus those over chains from the data unless chains are persistent."""
        synapse = firing.synapse
        v = firing.x.detach().reshape(-1, firing.x.shape[-1]).to(synapse.weight.dtype)
        h = torch.sigmoid(u.detach())
        sums = product_sums(firing, u, h, visible=v.sum(0))
        if self.persistent:
            return sums
        steps, state = self.param_groups[synapse.group]["steps"], self._own_state
        generator = self._noise.stream(
            v.device, state["seed"], state["step"], synapse.index, self._ranks[0], self._firings
        )
        self._firings += 1
        h = bernoulli(h.reshape(-1, u.shape[-1]), generator)  # reuses the probabilities of the positive phase
        self._subtract(sums, synapse, self._negative_phase(synapse, h, steps, generator), 1.0)
        return sums

    def changes(
        self, sums: Sums, synapse: Synapse, group: dict[str, Any], state: dict[str, Any]
    ) -> dict[Tensor, Tensor]:
        """Data minus model, for the weights and both biases."""
        if self.persistent:
            v = self._advanced(synapse, state["chains"].get(synapse.index))
            state["chains"] = {**state["chains"], synapse.index: v}
            self._subtract(sums, synapse, v, sums.events / len(v))
        product, hidden = means(sums)
        visible = sums.values["visible"] / sums.events
        biases: dict[Tensor | None, Tensor | None] = {
            self._rbms[synapse.layer].visible_bias: visible,
            synapse.bias: hidden,
        }
        own = {p: change for p, change in biases.items() if p is not None and change is not None and p.requires_grad}
        return {synapse.weight: product, **own}

    def _advanced(self, synapse: Synapse, v: Tensor | None) -> Tensor:
        """The persistent chains after this step's Gibbs steps."""
        machine, steps = self._rbms[synapse.layer], self.param_groups[synapse.group]["steps"]
        bias, state = machine.visible_bias.detach(), self._own_state
        generator = self._noise.stream(bias.device, state["seed"], state["step"], synapse.index)
        if v is None:
            v = bernoulli(torch.full((self.chains, len(bias)), 0.5, dtype=bias.dtype, device=bias.device), generator)
        with torch.autocast(bias.device.type, enabled=False):
            h = machine.sample_hidden(v.to(bias), generator)
        return self._negative_phase(synapse, h, steps, generator)

    def _negative_phase(self, synapse: Synapse, h: Tensor, steps: int, generator: torch.Generator) -> Tensor:
        """Visible units after the Gibbs steps; ``h``: the hidden units of the first one."""
        machine = self._rbms[synapse.layer]
        with torch.autocast(h.device.type, enabled=False):
            v = machine.sample_visible(h.to(machine.weight.dtype), generator)
            for _ in range(steps - 1):
                v = machine.sample_visible(machine.sample_hidden(v, generator), generator)
        return v

    def _subtract(self, sums: Sums, synapse: Synapse, v: Tensor, share: float) -> None:
        """Subtract the sums over samples of the negative phase, times ``share``."""
        with torch.autocast(v.device.type, enabled=False):
            h = self._rbms[synapse.layer].hidden_given(v)
            sums.values["product"].addmm_(h.T, v, alpha=-share)
        if "signal" in sums.values:
            hidden = sums.values["signal"]
            hidden.sub_(h.sum(0, dtype=hidden.dtype), alpha=share)
        visible = sums.values["visible"]
        visible.sub_(v.sum(0, dtype=visible.dtype), alpha=share)
