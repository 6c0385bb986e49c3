"""e-prop: eligibility traces of recurrent networks, and a learning signal for each neuron in each time step."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Unpack, final

from torch import Tensor, nn

from ..core.constraints import Constraint, one_of
from ..core.params import Params
from ..core.synapse import Synapse
from ..feedback.direct import LazyFeedback
from .base import TemporalFeedback, TemporalOptions

FEEDBACK: Constraint = one_of("symmetric", "random", "adaptive")


@final
class EProp(TemporalFeedback):
    r"""Recurrent networks learn without a pass backward through time: eligibility traces meet a learning signal.

    .. math::
        \Delta W_{ji} = -\sum_t L_j(t)\, e_{ji}(t), \qquad
        e_{ji}(t) = \frac{\partial z_j(t)}{\partial h_j(t)}\, \epsilon_{ji}(t), \qquad
        \epsilon_{ji}(t) = \frac{\partial h_j(t)}{\partial h_j(t - 1)}\, \epsilon_{ji}(t - 1)
        + \frac{\partial h_j(t)}{\partial W_{ji}}

    with the activity :math:`z` and the state :math:`h` of neuron :math:`j` (membrane potential, adaptation), the
    eligibility :math:`e` of a synapse, which a neuron can compute as time goes on, and the learning signal
    :math:`L_j(t) = \sum_k B_{kj}\, E_k(t)`, the error :math:`E` at the output by feedback weights :math:`B`. Compared
    with backpropagation through time, what is left out is that a neuron's activity acts on the loss by way of other
    neurons, later.

    *One backward pass* (the default): the network unrolls time in its ``forward``, with one call of each layer per time
    step, and ``loss.backward()`` is called once. Recurrent layers pass no error, and the output error reaches the
    others by :math:`B`. What remains of the pass is exactly e-prop.

    *Online* (``online=True``): ``backward()`` is called at each time step, with all states detached between, and
    `reset` at the start of each sequence. Traces carry the past, so that memory does not grow with time; the result is
    the same. Neurons must be modules that take their state as an argument and return it after their output, such as
    those of `bioopt.nn` and snntorch; layers must be Linear. A trace takes samples × inputs numbers where all neurons
    of a layer filter their input alike (`bioopt.nn.LIF`, `bioopt.nn.LeakyRate`), and samples × neurons × inputs
    otherwise: for a second state (`bioopt.nn.ALIF`), and below a leaky readout. Traces are no part of the state that is
    saved: save between sequences.

    The feedback weights of the readout are of the shape of its own; those of other layers that receive neurons of the
    network are of the shape outputs × presynaptic activity, as in `DirectFeedbackAlignment`.

    Args:
        params: the model (or modules, or groups whose ``"params"`` are modules), all of whose parameters learn. Bare
            parameters are refused.
        lr: learning rate of ``descent``, by default `torch.optim.Adam`.
        feedback: ``"symmetric"``: the error returns by the weights of the readout; to layers that the readout does not
            receive, by fixed random ones. ``"random"``: by fixed random weights. ``"adaptive"``: by weights that start
            at random, and change as those of the readout do, with the same decay; for layers that the readout does not
            receive, as weights from them to the output would.
        recurrent: the recurrent layers, by name or as modules, which pass no error; by default those whose input
            depends on their own earlier output, found in the first pass.
        online: whether ``backward()`` is called at each time step.
        decay: of the weights of all layers (not of biases) with ``feedback="adaptive"``.
        readout_layer: the layer at whose output the error is taken, by name or as a module; by default the last layer
            to fire.
        options: ``seed``, ``feedback_scale``, ``orthogonal``, ``centre_inputs``, ``exclude``, ``descent`` and its
            options, ``process_group``, as in the feedback family.

    Raises:
        ValueError: a hyperparameter out of range; a fused `torch.nn.RNN`, `torch.nn.LSTM` or `torch.nn.GRU`; a name of
            no layer; parameters that ``online=True`` cannot train.
        RuntimeError: a readout that feeds back into the network; online: a state that is not detached, a sequence
            without `reset`, neurons without a state or that depend on each other.

    Source: G. Bellec, F. Scherr, A. Subramoney, E. Hajek, D. Salaj, R. Legenstein & W. Maass (2020), *A solution to the
    learning dilemma for recurrent networks of spiking neurons*, Nature Communications 11.
    """

    def __init__(
        self,
        params: Params,
        lr: float = 2e-3,
        *,
        feedback: str = "symmetric",
        recurrent: str | nn.Module | Iterable[str | nn.Module] | None = None,
        online: bool = False,
        decay: float = 1e-4,
        readout_layer: str | nn.Module | None = None,
        **options: Unpack[TemporalOptions],
    ) -> None:
        self._check_value("feedback", feedback, FEEDBACK)
        self.kind = feedback
        super().__init__(
            params,
            lr,
            recurrent=recurrent,
            online=online,
            readout_layer=readout_layer,
            own={"decay": decay},
            **options,
        )

    def new_feedback(self, synapse: Synapse) -> nn.Module | None:
        """Weights whose shape the first pass decides, if they learn."""
        return LazyFeedback(synapse.weight) if self.kind == "adaptive" else None

    def weights_of(self, synapse: Synapse) -> Tensor:
        """By ``feedback``."""
        if self.kind == "adaptive":
            return self._own(synapse)
        if self.kind == "symmetric" and synapse in self._readouts:
            return synapse.weight
        return self._fixed(synapse)

    def learns(self, synapse: Synapse) -> bool:
        """Those that get a product of their own, with ``feedback="adaptive"``; not those of recurrent layers."""
        return self.kind == "adaptive"

    def learn_feedback(self, grads: dict[Tensor, Tensor], state: dict[str, Any]) -> None:
        """Of the readout, by the gradient of its forward weights; the decay of both."""
        if self.kind == "adaptive":
            self._pair_at_output(grads)
            self._add_decay(grads)
