r"""Eligibility traces, by which a backward pass of one time step reaches the past.

A neuron's state after a time step, :math:`h(t)`, depends on its own former state and its input alone. So its derivative
by the weights of the neuron follows from that of the step before,

.. math::
    \epsilon(t) = \frac{\partial h(t)}{\partial h(t - 1)}\, \epsilon(t - 1)
    + \frac{\partial h(t)}{\partial u(t)}\, x(t)^\top,

and the gradient at :math:`h(t - 1)`, where the graph of a time step ends, gives the change of the weights by the past.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn

from ..core.hooks import Hook, leave_no_trace
from ..core.recorder import Firing
from ..core.synapse import Synapse

if TYPE_CHECKING:
    from .base import TemporalFeedback


class Drive(NamedTuple):
    """A layer's firing in this time step."""

    synapse: Synapse
    edge: Any  #: of the layer's output, in the graph
    x: Tensor  #: presynaptic activity, samples × inputs, with a column of ones where there is a bias


class Slopes(NamedTuple):
    """The derivatives of some activity, samples × neurons; ``None`` where it does not depend on them."""

    drives: list[Tensor | None]  #: by the input that each layer gives
    leaves: list[Tensor | None]  #: by each former state


class Neurons(NamedTuple):
    """Some neurons in this time step."""

    drives: list[Drive]  #: the layers that give their input
    leaves: list[Tensor]  #: their former states, where the graph of this time step ends
    before: dict[Synapse, list[Tensor]]  #: traces of the former states for each layer, samples × neurons × inputs each
    slopes: list[Slopes]  #: of each new state

    def advanced(self, slopes: Slopes) -> dict[Synapse, Tensor]:
        """The trace of something with these slopes, for each layer; of one neuron where all are alike."""
        found = {}
        for drive, slope in zip(self.drives, slopes.drives, strict=True):
            terms = [
                _common(of_leaf).unsqueeze(-1) * trace
                for of_leaf, trace in zip(slopes.leaves, self.before.get(drive.synapse, []), strict=False)
                if of_leaf is not None
            ]
            if slope is not None:
                terms.append(_common(slope).unsqueeze(-1) * drive.x.unsqueeze(1))
            found[drive.synapse] = sum(terms[1:], terms[0]) if terms else torch.zeros_like(drive.x).unsqueeze(1)
        return found


class Eligibility:
    """The traces of all neurons of a network, and the gradients that they give.

    Attributes:
        watched: the modules with hooks.
        steps: time steps since the start of the sequence.
        memory: the leaky readout's, if there is one.
    """

    active = True

    def __init__(self, rule: TemporalFeedback) -> None:
        self.watched: set[nn.Module] = set()
        self.steps = 0
        self._rule = weakref.ref(rule)
        self._name = f"{type(rule).__name__}(online=True)"
        self._traces: dict[Any, dict[Synapse, list[Tensor]]] = {}  # by the module of neurons and the layers behind them
        self._memory = Memory()
        self._step = -1
        self._drives: dict[Any, Drive] = {}  # of this time step, by the nodes of their outputs
        self._groups: dict[Synapse, Neurons] = {}  # of this time step, by the layers that drive them
        self._running: dict[nn.Module, tuple[Tensor, list[Tensor]]] = {}
        self._measuring = False
        self._local: set[Any] = set()  # what was found to be local
        self._require_possible(rule)
        for root in rule._known.roots:
            for module in root.modules():
                layers = rule._recorder.synapses.keys()
                if not type(module).__module__.startswith("torch.nn.") and layers.isdisjoint(module.modules()):
                    self._watch(module, rule)

    def _watch(self, module: nn.Module, rule: TemporalFeedback) -> None:
        if module not in self.watched:
            self.watched.add(module)
            rule._recorder.keep(module.register_forward_pre_hook(Hook(self, "before"), with_kwargs=True))
            rule._recorder.keep(module.register_forward_hook(Hook(self, "after")))
            leave_no_trace(type(module))

    def _require_possible(self, rule: TemporalFeedback) -> None:
        """Raise for parameters that traces cannot train."""
        own = {p for s in rule._recorder.synapses.values() if type(s.layer) is nn.Linear for p in s.parameters()}
        others = [rule._names()[p] for p in rule._of_model() if p not in own]
        if others:
            raise ValueError(
                f"{self._name} trains the weights and biases of Linear layers alone: leave the others out by "
                f"exclude={others}, or call backward() once for the whole sequence (online=False)"
            )

    def reset(self) -> None:
        """Start a new sequence."""
        self.steps = 0
        self._traces, self._memory = {}, Memory()
        self._drives, self._groups = {}, {}
        self._running.clear()

    def require_neurons(self) -> None:
        """Raise if no layer is followed by neurons whose state is an argument."""
        if not self._traces:
            raise RuntimeError(
                f"{self._name}: no neurons with a state were found. They must be modules that take their state and "
                "return it after their output, as bioopt.nn.LIF, ALIF and LeakyRate do"
            )

    def finish_step(self) -> None:
        """End a time step, all of whose layers have fired."""
        self.require_neurons()
        rule, readout = self._rule(), next(reversed(self._drives.values())).synapse
        if rule is not None:
            readout = rule._readout_synapse or readout
            self._memory.advance(self._name, readout, self._groups.get(readout))
        self._drives, self._groups = {}, {}

    # -- as layers and neurons fire -----------------------------------------------------------------------------------

    @torch.no_grad()
    def fire(self, firing: Firing, u: Tensor, step: int) -> None:
        """Take note of a layer's output in a time step."""
        if step != self._step or not self.steps:
            if self._drives:
                self.finish_step()
            self._step = step
            self.steps += 1
            self._running.clear()
        synapse, x = firing.synapse, firing.x.detach()
        x = x.reshape(-1, x.shape[-1]).to(u.dtype)
        if synapse.bias is not None:
            x = torch.cat([x, x.new_ones(len(x), 1)], 1)
        if self._memory.leaky is not False and firing.x.requires_grad:
            self._memory.inputs[synapse] = firing.x.detach(), self._sensitivity(synapse, firing.x)
        edge = torch.autograd.graph.get_gradient_edge(u)
        self._drives[edge.node] = Drive(synapse, edge, x)

    def before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Let the graph of a time step end at the former states of neurons."""
        tensors = list(_tensors_in([*args, *kwargs.values()]))
        if self._running:  # inside of other neurons
            return None
        if not (module.training and torch.is_grad_enabled() and tensors and self._behind(tensors[0])):
            return None
        u = tensors[0]
        leaves: list[Tensor] = []

        def leaf(value: Tensor) -> Tensor:
            if value is u or value.shape != u.shape:
                return value
            if value.requires_grad:
                raise RuntimeError(
                    f"{self._name}: a state that {type(module).__name__} receives has a graph: detach the states that "
                    "are carried to the next time step (state.detach())"
                )
            leaves.append(value.detach().requires_grad_())
            return leaves[-1]

        given = _mapped(leaf, args), {name: _mapped(leaf, value) for name, value in kwargs.items()}
        self._running[module] = u, leaves
        return given

    @torch.no_grad()
    def after(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """Advance the traces of neurons."""
        u, leaves = self._running.pop(module, (None, []))
        if u is None:
            return
        states = [value for value in list(_tensors_in([output]))[1:] if value.shape == u.shape]
        if not states:
            self._require_stateless(module)
            return
        drives = self._behind(u)
        key = (module, *(drive.synapse for drive in drives))
        before = self._traces.get(key, {})
        self._require_sequence(module, u, leaves, states, before)
        inputs = [*(drive.edge for drive in drives), *leaves]
        neurons = Neurons(drives, leaves, before, [self._slopes(module, h, inputs, len(drives)) for h in states])
        rows = [neurons.advanced(slopes) for slopes in neurons.slopes]
        self._traces[key] = {drive.synapse: [row[drive.synapse] for row in rows] for drive in drives}
        for index, leaf in enumerate(leaves):
            leaf.register_hook(partial(self._arrive, before, index))
        if any(drive.synapse is self._memory.readout for drive in drives):
            for leaf in leaves:
                leaf.register_hook(partial(self._arrive_at_readout, self._memory.held()))
        for drive in drives:
            self._groups[drive.synapse] = neurons

    def _behind(self, value: Tensor) -> list[Drive]:
        """The layers of this time step that a tensor depends on directly."""
        todo, seen, found = [value.grad_fn], set(), []
        while todo:
            node = todo.pop()
            if node is None or node in seen:
                continue
            seen.add(node)
            if node in self._drives:
                found.append(self._drives[node])
            else:
                todo += [n for n, _ in node.next_functions]
        return sorted(found, key=lambda drive: drive.synapse.index)

    def _slopes(self, owner: Any, h: Tensor, inputs: list[Any], drives: int) -> Slopes:
        """The derivatives of each neuron's ``h`` by its own inputs and former states.

        Raises:
            RuntimeError: it depends on other neurons or samples, too.
        """
        if not h.requires_grad:
            return Slopes([None] * drives, [None] * (len(inputs) - drives))

        def along(signal: Tensor) -> list[Tensor | None]:
            self._measuring = True  # the hooks on former states are for the user's backward passes
            try:
                return list(torch.autograd.grad(h, inputs, signal, retain_graph=True, allow_unused=True))
            finally:
                self._measuring = False

        slopes = along(torch.ones_like(h))
        if (owner, len(inputs)) not in self._local:
            self._local.add((owner, len(inputs)))
            width = h.shape[-1]
            events = torch.arange(h.numel(), device=h.device)
            board = ((events % width + events // width) % 2).view_as(h).to(h.dtype)
            for slope, part in zip(slopes, along(board), strict=True):
                if slope is None or part is None or (slope.shape == h.shape and torch.equal(slope * board, part)):
                    continue
                self._local.discard((owner, len(inputs)))
                name = owner.name if isinstance(owner, Synapse) else type(owner).__name__
                raise RuntimeError(
                    f"{self._name}: what '{name}' receives must depend, for each neuron, on that neuron's own input "
                    "and state alone, without pooling or normalisation between: call backward() once for the whole "
                    "sequence (online=False)"
                )
        flat = [None if slope is None else slope.reshape(-1, slope.shape[-1]) for slope in slopes]
        return Slopes(flat[:drives], flat[drives:])

    def _sensitivity(self, synapse: Synapse, x: Tensor) -> dict[Synapse, Tensor] | None:
        """The traces of a layer's input; ``None`` if that does not come from neurons of the same shape."""
        groups = {id(group): group for d in self._behind(x) if (group := self._groups.get(d.synapse)) is not None}
        found: dict[Synapse, Tensor] = {}
        for group in groups.values():
            inputs = [*(drive.edge for drive in group.drives), *group.leaves]
            try:
                found |= group.advanced(self._slopes(synapse, x, inputs, len(group.drives)))
            except RuntimeError:
                return None
        return found

    # -- as a backward pass ends at a former state --------------------------------------------------------------------

    @torch.no_grad()
    def _arrive(self, traces: dict[Synapse, list[Tensor]], index: int, gradient: Tensor) -> None:
        """Add to the gradients of the layers that drive the neurons."""
        for synapse, rows in traces.items() if not self._measuring else ():
            _add(synapse, gradient.reshape(-1, gradient.shape[-1]), rows[index])

    @torch.no_grad()
    def _arrive_at_readout(self, held: Held, gradient: Tensor) -> None:
        """Add to the gradients of the layers below a leaky readout, which has kept the past."""
        rule = self._rule()
        if rule is None or self._measuring:
            return
        for receiver, (x, traces) in held.items():
            signal = rule.returned_by(receiver, gradient, x.shape)
            for synapse, trace in traces.items():
                _add(synapse, signal.reshape(-1, signal.shape[-1]), trace)
            if receiver is not self._memory.readout and rule.learns(receiver):
                rule._add_product(receiver, gradient, x)

    # -- bad input ----------------------------------------------------------------------------------------------------

    def _require_stateless(self, module: nn.Module) -> None:
        inside = [*vars(module).values(), *module.buffers(False)]
        if any(isinstance(value, Tensor) and value.grad_fn is not None for value in inside):
            raise RuntimeError(
                f"{self._name}: {type(module).__name__} keeps its state inside: it must take its state as an argument "
                "and return it after its output (for snntorch: init_hidden=False)"
            )

    def _require_sequence(
        self,
        module: nn.Module,
        u: Tensor,
        leaves: list[Tensor],
        states: list[Tensor],
        before: dict[Synapse, list[Tensor]],
    ) -> None:
        """Raise where a new sequence has begun without `reset`."""
        name = type(module).__name__
        if before and not leaves:
            raise RuntimeError(
                f"{self._name}: {name} starts a new sequence, but traces of the last one remain: call "
                "optimizer.reset() at the start of each sequence"
            )
        if leaves and len(leaves) != len(states):
            raise RuntimeError(
                f"{self._name}: {name} received {len(leaves)} states and returned {len(states)}: it must take all of "
                "its states as arguments, and return them after its output"
            )
        samples = u.numel() // u.shape[-1]
        for rows in before.values():
            if any(len(row) != samples for row in rows):
                raise RuntimeError(
                    f"{self._name}: the input of {name} has the shape {tuple(u.shape)}, but its traces are of "
                    f"{len(rows[0])} samples: call optimizer.reset() at the start of each sequence"
                )


#: for each layer with feedback: its input, and the traces of that for the layers behind it
Held: TypeAlias = dict[Synapse, tuple[Tensor, dict[Synapse, Tensor]]]


class Memory:
    """What a leaky readout remembers: the inputs of layers with feedback, and their traces, filtered by its leak.

    Attributes:
        readout: the layer whose output the readout's neurons receive, known from the second time step on.
        leaky: whether the readout has a state; ``None``: not known yet.
        inputs: of this time step, as in `held`; with ``None`` for traces that are not known.
    """

    def __init__(self) -> None:
        self.readout: Synapse | None = None
        self.leaky: bool | None = None
        self.inputs: dict[Synapse, tuple[Tensor, dict[Synapse, Tensor] | None]] = {}
        self._held: Held = {}

    def held(self) -> Held:
        """The sums over the past, before this time step."""
        return self._held

    def advance(self, rule: str, readout: Synapse, neurons: Neurons | None) -> None:
        """End a time step, with the neurons that follow the readout."""
        self.readout, self.leaky = readout, neurons is not None
        inputs, self.inputs = self.inputs, {}
        if neurons is None:
            return
        leak, gain = self._rates(rule, neurons)
        held: Held = {}
        for receiver, (x, traces) in inputs.items():
            if traces is None:
                raise RuntimeError(
                    f"{rule}: the readout '{readout.name}' has a state, so layer '{receiver.name}' must receive the "
                    "output of neurons itself: call backward() once for the whole sequence (online=False)"
                )
            former, sums = self._held.get(receiver, (torch.zeros_like(x), {}))
            held[receiver] = (
                leak * former + gain * x,
                {
                    synapse: gain * trace + (leak * sums[synapse] if synapse in sums else 0.0)
                    for synapse, trace in traces.items()
                },
            )
        self._held = held

    def _rates(self, rule: str, neurons: Neurons) -> tuple[float, float]:
        """The leak of the readout, and the factor of its input."""
        slopes = neurons.slopes[0]
        given = [slopes.drives[0], *slopes.leaves]
        rates = [float(slope.flatten()[0]) for slope in given if slope is not None]
        alike = all(bool((slope == slope.flatten()[0]).all()) for slope in given if slope is not None)
        if len(neurons.slopes) > 1 or len(neurons.drives) > 1 or not alike or slopes.drives[0] is None:
            raise RuntimeError(
                f"{rule}: the readout '{neurons.drives[0].synapse.name}' must have one state, linear and with the same "
                "leak for all of its units, such as bioopt.nn.LeakyRate(activation=None)"
            )
        return (rates[1] if len(rates) > 1 else 0.0), rates[0]


def _common(slope: Tensor) -> Tensor:
    """The slope of one neuron, if it is that of all."""
    first = slope[:, :1]
    return first if bool((slope == first).all()) else slope


def _add(synapse: Synapse, signal: Tensor, trace: Tensor) -> None:
    """Add ``Σ signal × trace`` to the gradients of a layer."""
    product = signal.T @ trace[:, 0] if trace.shape[1] == 1 else torch.einsum("nj,nji->ji", signal, trace)
    parts = [(synapse.weight, product[:, : synapse.weight.shape[1]])]
    if synapse.bias is not None:
        parts.append((synapse.bias, product[:, -1]))
    for p, part in parts:
        if any(p is own for own in synapse.parameters()):
            part = part.to(p.dtype)
            p.grad = part.clone() if p.grad is None else p.grad + part


def _tensors_in(values: Any) -> Iterator[Tensor]:
    """All tensors in nested tuples, lists and dicts, in order."""
    if isinstance(values, Tensor):
        yield values
    elif isinstance(values, dict):
        yield from _tensors_in(list(values.values()))
    elif isinstance(values, tuple | list):
        for value in values:
            yield from _tensors_in(value)


def _mapped(change: Callable[[Tensor], Tensor], values: Any) -> Any:
    """The same nest with other tensors."""
    if isinstance(values, Tensor):
        return change(values)
    if isinstance(values, dict):
        return {name: _mapped(change, value) for name, value in values.items()}
    if isinstance(values, tuple | list):
        inner = [_mapped(change, value) for value in values]
        return values._make(inner) if hasattr(values, "_make") else type(values)(inner)
    return values
