"""The online mode: hooks on neurons, by which a backward pass of one time step reaches the past.

The equations are in `traces`.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..core.hooks import Hook, leave_no_trace
from ..core.products import in_full
from ..core.recorder import Firing
from ..core.synapse import Synapse
from .traces import Drive, Held, Memory, Neurons, Slopes, ending_in_the_past

if TYPE_CHECKING:
    from .base import TemporalFeedback


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
        self._running: dict[nn.Module, tuple[Tensor, list[Any]]] = {}
        self._local: set[Any] = set()  # what was found to be local
        self._require_possible(rule)
        self._watch(rule)

    def _watch(self, rule: TemporalFeedback) -> None:
        """Install hooks on all modules that may be neurons."""
        layers = rule._recorder.synapses.keys()
        for module in (module for root in rule._known.roots for module in root.modules()):
            own = type(module).__module__.startswith("torch.nn.")
            if module not in self.watched and not own and layers.isdisjoint(module.modules()):
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
        if (rule := self._rule()) is not None:  # whose groups may be more by now
            self._watch(rule)

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
        x = in_full(x.reshape(-1, x.shape[-1]))
        if synapse.bias is not None:
            x = torch.cat([x, x.new_ones(len(x), 1)], 1)
        if self._memory.leaky is not False and firing.x.requires_grad:
            self._memory.inputs[synapse] = firing.x.detach(), self._sensitivity(synapse, firing.x)
        edge = torch.autograd.graph.get_gradient_edge(u)
        self._drives[edge.node] = Drive(synapse, edge, x)

    def before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Let the graph of a time step end at the former states of neurons."""
        tensors = list(_tensors_in([*args, *kwargs.values()]))
        inside = bool(self._running)  # of other neurons
        if inside or not (module.training and torch.is_grad_enabled() and tensors and self._behind(tensors[0])):
            return None
        u = tensors[0]
        formers: list[Any] = []
        layers = tuple(drive.synapse for drive in self._behind(u))
        traces, held = self._traces.get((module, *layers), {}), self._memory.held_by(layers)
        synapses = {*layers, *(synapse for _, of_input in held.values() for synapse in of_input)}

        def former(value: Tensor) -> Tensor:
            if value is u or value.shape != u.shape:
                return value
            if value.requires_grad:
                raise RuntimeError(
                    f"{self._name}: a state that {type(module).__name__} receives has a graph: detach the states that "
                    "are carried to the next time step (state.detach())"
                )
            # The graph must not hold the rule, which holds parts of the graph.
            products = partial(_products, self._rule, traces, len(formers), held)
            state = ending_in_the_past(value, products, synapses)
            formers.append(torch.autograd.graph.get_gradient_edge(state))
            return state

        given = _mapped(former, args), {name: _mapped(former, value) for name, value in kwargs.items()}
        self._running[module] = u, formers
        return given

    @torch.no_grad()
    def after(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """Advance the traces of neurons."""
        u, formers = self._running.pop(module, (None, []))
        if u is None:
            return
        states = [value for value in list(_tensors_in([output]))[1:] if value.shape == u.shape]
        if not states:
            self._require_stateless(module)
            return
        drives = self._behind(u)
        key = (module, *(drive.synapse for drive in drives))
        before = self._traces.get(key, {})
        self._require_sequence(module, u, formers, states, before)
        inputs = [*(drive.edge for drive in drives), *formers]
        neurons = Neurons(drives, formers, before, [self._slopes(module, h, inputs, len(drives)) for h in states])
        rows = [neurons.advanced(slopes) for slopes in neurons.slopes]
        self._traces[key] = {drive.synapse: [row[drive.synapse] for row in rows] for drive in drives}
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
            return list(torch.autograd.grad(h, inputs, signal, retain_graph=True, allow_unused=True))

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
            inputs = [*(drive.edge for drive in group.drives), *group.formers]
            try:
                found |= group.advanced(self._slopes(synapse, x, inputs, len(group.drives)))
            except RuntimeError:
                return None
        return found

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
        formers: list[Any],
        states: list[Tensor],
        before: dict[Synapse, list[Tensor]],
    ) -> None:
        """Raise where a new sequence has begun without `reset`."""
        name = type(module).__name__
        if before and not formers:
            raise RuntimeError(
                f"{self._name}: {name} starts a new sequence, but traces of the last one remain: call "
                "optimizer.reset() at the start of each sequence"
            )
        if formers and len(formers) != len(states):
            raise RuntimeError(
                f"{self._name}: {name} received {len(formers)} states and returned {len(states)}: it must take all of "
                "its states as arguments, and return them after its output"
            )
        samples = u.numel() // u.shape[-1]
        for rows in before.values():
            if any(len(row) != samples for row in rows):
                raise RuntimeError(
                    f"{self._name}: the input of {name} has the shape {tuple(u.shape)}, but its traces are of "
                    f"{len(rows[0])} samples: call optimizer.reset() at the start of each sequence"
                )


def _products(
    rule: weakref.ref[TemporalFeedback],
    traces: dict[Synapse, list[Tensor]],
    index: int,
    held: Held,
    gradient: Tensor,
) -> Iterator[tuple[Synapse, Tensor, Tensor]]:
    """The signals and traces of all layers that acted on a former state.

    Args:
        rule: whose feedback goes to the layers below a leaky readout.
        traces: of the former states.
        index: of the state.
        held: what the readout remembers of its input, if the neurons are its own.
        gradient: at the state.
    """
    for synapse, rows in traces.items():
        yield synapse, gradient, rows[index]
    own = rule()
    for receiver, (x, of_input) in held.items() if own is not None else ():
        signal = own.returned_by(receiver, gradient, x.shape)  # type: ignore[union-attr]
        for synapse, trace in of_input.items():
            yield synapse, signal, trace
        own.learn_from(receiver, gradient, x)  # type: ignore[union-attr]


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
