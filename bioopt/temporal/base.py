"""The base of temporal rules: the error of each time step goes to every layer directly, and not back in time."""

from __future__ import annotations

import weakref
from abc import abstractmethod
from collections.abc import Callable, Iterable
from typing import Any, Unpack

import torch
from torch import Tensor, nn

from ..core.errors import warn
from ..core.params import GradientOptions, Params
from ..core.recorder import Firing
from ..core.synapse import Synapse
from ..feedback.direct import LearnedDirectFeedback, channels_last
from .eligibility import Eligibility
from .sequence import Sequence


class TemporalOptions(GradientOptions, total=False):
    """Options of temporal rules, as of other feedback; `RandomFeedback` and `FeedbackRule` describe them."""

    seed: int
    feedback_scale: float
    fan_in: float | None
    orthogonal: bool


class TemporalFeedback(LearnedDirectFeedback):
    """Direct feedback in time: recurrent layers pass no error, the others get that of their own time step.

    The readout sends its error to the layer below by feedback weights of the shape of its own.

    Args:
        params: as in `FeedbackRule`.
        lr: learning rate of ``descent``, by default `torch.optim.Adam`.
        recurrent: the recurrent layers, by name or as modules; by default they are found in the first pass.
        online: whether ``backward()`` is called at each time step.
        readout_layer: as in `DirectFeedback`.
        own: as in `FeedbackRule`.
        options: ``seed``, ``feedback_scale``, ``fan_in``, ``orthogonal`` (``False`` by default), ``centre_inputs``,
            ``exclude``, ``descent`` and its options, ``process_group``, as in `RandomFeedback`.
    """

    def __init__(
        self,
        params: Params,
        lr: float,
        *,
        recurrent: str | nn.Module | Iterable[str | nn.Module] | None,
        online: bool,
        readout_layer: str | nn.Module | None,
        own: dict[str, Any],
        **options: Unpack[TemporalOptions],
    ) -> None:
        options.setdefault("orthogonal", False)
        self._require_bool("online", online)
        self._sequence = Sequence()
        self._errors: dict[int, Tensor] = {}  # at the output, by the number of its firing
        self._last_error: Tensor | None = None
        self._number: int | None = None  # of the firing in progress
        self._looking = recurrent is None
        self._warned = False
        self._readouts: set[Synapse] = set()  # layers at whose output an error was taken
        self._traces: Eligibility | None = None
        super().__init__(params, lr, readout_layer=readout_layer, own=own, **options)
        if recurrent is not None:
            named = [recurrent] if isinstance(recurrent, str | nn.Module) else recurrent
            self._sequence.recurrent.update(self._found(layer, "recurrent") for layer in named)
        if online:
            self._traces = Eligibility(self)
        self._recorder.act(self._enter, self._fire)

    @property
    def online(self) -> bool:
        """Whether ``backward()`` is called at each time step."""
        return self._traces is not None

    @abstractmethod
    def learns(self, synapse: Synapse) -> bool:
        """Whether the feedback weights to the input of a layer below the readout learn."""

    def reset(self) -> None:
        """Start a new sequence: drop the traces of the past. For the online mode; gradients stay."""
        if self._traces is not None:
            self._warn_without_time(self._traces.steps == 1)
            self._traces.reset()
        self._forget()

    def begin(self) -> None:
        """Start an evaluation that alone will count; online, the sequence goes on."""
        if not self.online:
            self._forget()
        super().begin()

    def discard(self) -> None:
        """Drop all passes since the last step, and ``.grad``: the next step learns nothing from them."""
        self.reset()
        super().discard()

    def collect(self, losses: Tensor | None = None) -> tuple[dict[Tensor, Tensor], dict[str, Any]]:
        """The gradients of all backward passes since the last step, and what feedback weights learn."""
        if self._recorder.fired:
            self._require_open()
            if self._traces is not None:
                self._traces.require_neurons()
        collected = super().collect(losses)
        if self._traces is None:
            self._warn_without_time(not self._sequence.has_time())
            self._looking = self._looking and not self._sequence.has_time()
            self._forget()
        return collected

    def _forget(self) -> None:
        self._errors.clear()
        self._last_error = None
        self._sequence.clear()

    def _warn_without_time(self, without: bool) -> None:
        if without and not self._warned:
            self._warned = True
            warn(
                f"{type(self).__name__}: every layer fired once, so the network has no time: the rule is direct "
                "feedback alignment there. Unroll time in forward(), with one call of a layer per time step"
            )

    def _require_open(self) -> None:
        """Raise if the readout feeds back into the network."""
        output = self._output
        if output in self._sequence.fed_back:
            raise RuntimeError(
                f"{type(self).__name__}: the readout '{output.name}' feeds back into the network, since a recurrent "
                "layer's input depends on its output: detach what is fed back (y.detach()), or name the layer that "
                "gives the network's output, readout_layer='...'"
            )

    # -- as a layer fires ---------------------------------------------------------------------------------------------

    def _fire(self, firing: Firing, u: Tensor) -> Tensor:
        synapse, sequence = firing.synapse, self._sequence
        if firing.replay:
            self._number = None
            return u if synapse in sequence.recurrent else self._leave(firing, u)
        before, self._number = sequence.step, sequence.fire(synapse)
        if self.online and sequence.step != before:
            self._own_step()
        if not torch.is_grad_enabled():
            return u if synapse in sequence.recurrent else self._leave(firing, u)
        looking = self._looking or self.online
        if looking and self._depends_on_itself(synapse, firing.x) and self.online:
            raise RuntimeError(
                f"{type(self).__name__}(online=True): the input of layer '{synapse.name}' depends on its own earlier "
                "output: detach the activity and the states that are carried to the next time step"
            )
        u = u if synapse in sequence.recurrent else self._leave(firing, u)
        if looking:
            sequence.mark(synapse, u)
        if self._traces is not None:
            self._traces.fire(firing, u, sequence.step)
        return u

    def _depends_on_itself(self, synapse: Synapse, x: Tensor) -> bool:
        try:
            return self._sequence.look(synapse, x)
        except RuntimeError as error:
            raise RuntimeError(f"{type(self).__name__}: {error}") from None

    def feedback_of(self, firing: Firing) -> Callable[[Tensor], Tensor]:
        """The error of the time step of this firing."""
        synapse, shape, last, number = firing.synapse, firing.x.shape, channels_last(firing.x), self._number
        x = firing.x.detach() if self.learns(synapse) else None
        own = weakref.ref(self)  # online, the rule holds parts of the graph, which must not hold it

        def feedback(g: Tensor) -> Tensor:
            rule = own()
            if rule is None or synapse in rule._sequence.recurrent:  # found after this firing
                return g.new_zeros(shape)
            if synapse is rule._output:
                rule._last_error = g.movedim(synapse.channel_dim, -1)
                if number is not None:
                    rule._errors[number] = rule._last_error
                return rule.returned_by(synapse, g, shape)
            error = rule._error_in(synapse, number, shape)
            if error is None:
                return g.new_zeros(shape)
            returned = rule._sent(synapse, error, shape, last)
            if x is not None:
                rule._add_product(synapse, error, x)
            return returned

        return feedback

    def learn_from(self, synapse: Synapse, error: Tensor, x: Tensor) -> None:
        """Add to the gradient of feedback weights that learn; those of the readout have that of its weights."""
        if self.learns(synapse) and synapse is not self._output:
            self._add_product(synapse, error, x)

    def returned_by(self, synapse: Synapse, g: Tensor, shape: torch.Size) -> Tensor:
        """The learning signal at the input of a layer, for an error at the output of the network."""
        if synapse is not self._output:
            return self._sent(synapse, g, shape)
        self._shapes[synapse] = synapse.weight.shape
        self._readouts.add(synapse)
        return synapse.transpose(self.weights_of(synapse), g, shape)

    def _error_in(self, synapse: Synapse, number: int | None, shape: torch.Size) -> Tensor | None:
        """The error at the output in the time step of a firing; ``None`` if the loss does not depend on that."""
        output = self._output
        place = None if number is None else self._sequence.place(synapse, number, output)
        if place is None:
            if self._last_error is None or number is not None:
                raise RuntimeError(
                    f"{type(self).__name__}: the error has reached layer '{synapse.name}' before the readout "
                    f"'{output.name}': name the layer that gives the network's output, readout_layer='...'"
                )
            return self._last_error
        error = self._errors.get(place.readout)
        if error is None or place.shared_by == 1:
            return error
        if error.ndim > 2 and type(output.layer) is nn.Linear:  # the readout ran once, on all time steps
            along = [dim for dim in (0, 1) if error.shape[dim] == place.shared_by and error.shape[1 - dim] == shape[0]]
            if len(along) > 1:
                raise RuntimeError(
                    f"{type(self).__name__}: the error at the output '{output.name}' has the shape "
                    f"{tuple(error.shape)}, of which either dimension may be the time: use a batch of another size, or "
                    "call the readout once per time step"
                )
            if along:
                return error.select(along[0], place.position)
        return error / place.shared_by  # one output for several time steps

    def _own_step(self) -> None:
        """Drop what belongs to earlier time steps."""
        self._errors.clear()
        self._sequence.keep_step()
