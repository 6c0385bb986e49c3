"""`BlockRule`: where the blocks of a network end, and what counts of what they learn there."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Sequence
from typing import Any, Unpack

import torch
from torch import Tensor, nn
from torch.optim import Adam

from ..core._torch_private import in_backward
from ..core.acts import detached
from ..core.constraints import NON_NEGATIVE, POSITIVE_INT, SEED, one_of, require_labels
from ..core.errors import warn
from ..core.params import Params, named_modules_of
from ..core.probe import keeping_modes
from ..core.reach import Gates, Pending, gates_behind, shut_gates
from ..core.readout import GradientReadoutOptions
from ..core.recorder import Firing
from ..core.rows import rows_now
from ..core.rule import LearningRule, optional
from ..core.sums import add_up
from ..core.synapse import Synapse
from .blocks import Block, Share, divided, require_apart

__all__ = ["BlockRule"]


class BlockRule(LearningRule):
    r"""A rule with a loss for each block of layers, from which that block alone learns.

    A block reaches from a layer to the next layer that its activity enters. There it learns from a loss of its own,
    usually with a head that belongs to the optimizer, and the next layer receives the activity without its graph. So no
    error passes between blocks, whatever connections bypass them: a gradient ends where a block has ended. Layers whose
    activities enter the next layer together (queries, keys and values) learn together, by the head of the first of
    them. A layer that runs twice learns from the loss of each run. The readout, the last layer, learns from the loss of
    the closure, by the exact gradient of its own weights: by ``descent``, as the blocks do, or with
    ``readout="delta"`` on standardised activity.

    A block's update counts when a backward pass reaches it, like the updates of Hebbian rules, so that a loss that is
    thrown away teaches nothing.

    Args:
        params: the model (or modules, or groups whose ``"params"`` are modules), all of whose parameters learn. Bare
            parameters are refused.
        lr: learning rate of ``descent``, by default `torch.optim.Adam`.
        head_lr: learning rate of the heads; by default ``lr``.
        blocks: modules, or their names, each of which learns as one block. They must not overlap, and must contain all
            layers but the readout. By default each layer is a block, and the last in registration order is the readout.
        classes: the number of classes; by default that of neurons of the readout.
        seed: of the initial values of the heads.
        example: an input of the model, from which heads get their sizes at once; by default they get them in the first
            training pass, or from a loaded state.
        readout: ``None``, or ``"delta"``, with ``readout_lr``, ``readout_layer`` (one layer) and
            ``readout_options``, as in `bioopt.LearningRule`.
        own: further hyperparameters of the rule, each of which may differ between groups (for subclasses).
        options: ``centre_inputs``, ``exclude``, ``descent`` and its options, ``process_group`` (average gradients over
            these ranks, each with its share of the batch), as in `bioopt.LearningRule`.

    Attributes:
        target: the labels, one for each sample, to be set before each forward pass; `step` clears it.

    Raises:
        ValueError: an option out of range; blocks without layers, that overlap or that leave layers out; a model
            without plastic layers, or with layers that have weights and are no known synapses; a ``"delta"`` readout
            that is in a block, or shares its weights with one.
        TypeError: bare parameters; a model wrapped in DistributedDataParallel.
    """

    splits_batch = True
    centres_inputs = True
    scales_with_loss = False
    #: whether the losses need labels
    needs_target = True
    #: the pass that runs, of rules of several: 0 is the ordinary pass, from which the readout learns
    _phase = 0

    def __init__(
        self,
        params: Params,
        lr: float = 2e-3,  # η
        *,
        head_lr: float | None = None,
        blocks: Sequence[str | nn.Module] | None = None,
        classes: int | None = None,
        seed: int = 0,
        example: Any = None,
        readout: str | None = None,
        own: dict[str, Any] | None = None,
        **options: Unpack[GradientReadoutOptions],
    ) -> None:
        options.setdefault("descent", Adam)
        self._check_value("readout", readout, one_of("delta", None))
        self._check_value("seed", seed, SEED)
        for option, value, constraint in (("head_lr", head_lr, NON_NEGATIVE), ("classes", classes, POSITIVE_INT)):
            if value is not None:
                self._check_value(option, value, constraint)
        self.head_lr, self.classes, self.seed = head_lr, classes, seed
        self._given_blocks = blocks
        self._modules: list[tuple[str, nn.Module]] = []
        self._blocks: dict[Synapse, Block] = {}
        self._mine: set[Tensor] = set()
        self._counted: list[Share] = []  # since the last step
        # In a further pass: layers that inputs of the network entered, these, and what the layers received in place.
        self._inputs: list[tuple[Synapse, Tensor, Tensor]] = []
        self._checked: Tensor | None = None  # the last target whose labels were found to be in range
        self._warned_of: set[Block] = set()
        super().__init__(params, {"lr": lr, **(own or {})}, readout=readout, **options)
        self._recorder.reach.linked = True
        self._recorder.reach.arrive = self._count
        self._recorder.act(self._enter, self._leave)
        if example is not None:
            self._size_heads(params, example)

    # -- what a rule implements ---------------------------------------------------------------------------------

    @abstractmethod
    def _at_end(self, blocks: list[Block], behind: Gates, x: Tensor, channel_dim: int) -> dict[Tensor, Tensor]:
        """The ``.grad`` of the parameters of blocks that end together, and of the head of the first.

        Args:
            blocks: whose activity enters the next layer here.
            behind: the gates behind ``x``; those of these blocks are open.
            x: the activity, with its graph.
            channel_dim: the dimension of the neurons in ``x``, counted from the end.
        """

    @optional
    def new_head(self, block: Block) -> nn.Module | None:
        """A module of the rule's own for the loss of a block, which may be lazy; by default none.

        ``self.head(block, activity)`` calls it.
        """
        return None

    # -- for rules ----------------------------------------------------------------------------------------------

    def head(self, block: Block, *args: Any) -> Any:
        """Call the head of a block."""
        return self._owned(block.name, *args)

    def labels(self, h: Tensor) -> Tensor:
        """The labels of the samples in ``h``, a long tensor."""
        name, target, rows = type(self).__name__, self.target, rows_now()
        if target is None:
            raise RuntimeError(self._no_target())
        if target is not self._checked:
            readout, more = self._readout_synapse.name, "; if there are other classes, write classes="
            require_labels(name, target, target.shape[:1], self.number_of_classes, readout, more=more)
            self._checked = target
        if rows is not None:
            target = target[rows.index]
        if len(target) != len(h):
            raise RuntimeError(
                f"{name}: the activity at the end of a block has the shape {tuple(h.shape)}, whose first dimension "
                f"must be the samples, but there are {len(target)} labels: set optimizer.target to the labels of this "
                "batch, and let no block end where samples are merged (blocks=)"
            )
        return target.long().to(h.device)

    @property
    def number_of_classes(self) -> int:
        """As given, or that of the neurons of the readout."""
        return len(self._readout_synapse.weight) if self.classes is None else self.classes

    # -- which layers -------------------------------------------------------------------------------------------

    def _require_addable(self, modules: list[tuple[str, nn.Module]]) -> None:
        """Raise for a layer of the model behind another one, whose block would end before it."""
        if not self._blocks or self._given_blocks is not None:
            return
        inside = {m: name for prefix, root in self._modules for name, m in root.named_modules(prefix=prefix)}
        order = {m: i for i, m in enumerate(inside)}
        first = min(order[s.layer] for s in self._blocks)
        for _, module in modules:
            if order.get(module, first) > first:
                raise ValueError(
                    f"{type(self).__name__}: layer '{inside[module]}' would end the block before it elsewhere, "
                    "but its head is made: build a new optimizer"
                )

    def _own_for(self, synapses: list[Synapse]) -> None:
        order = {m: i for i, m in enumerate(dict.fromkeys(m for _, root in self._modules for m in root.modules()))}
        apart = [*self._readout.layers.values()]
        others = [s for s in self._recorder.synapses.values() if s not in apart]
        everything = [*sorted(others, key=lambda s: order[s.layer]), *apart]
        blocks = divided(type(self).__name__, everything, self._given_blocks, self._modules)
        self._blocks = {s: block for block in blocks for s in block.synapses}
        require_apart(type(self).__name__, apart, self._blocks, self._readout_synapse)
        self._owned.seed = self.seed
        new: dict[str, nn.Module] = {}
        for block in dict.fromkeys(self._blocks.values()):
            if block.name not in self._owned and (head := self.new_head(block)) is not None:
                new[block.name] = head
        if new:
            self.own(new, lr=self.defaults["lr"] if self.head_lr is None else self.head_lr)
        self._mine = {*self._trained()}

    @property
    def _readout_synapse(self) -> Synapse:
        """The layer that is in no block."""
        return next(s for s in self._recorder.synapses.values() if s not in self._blocks)

    def _size_heads(self, params: Params, example: Any) -> None:
        """Give heads their sizes, in a pass that counts for nothing."""
        name, modules = type(self).__name__, named_modules_of(params)
        if len(modules) != 1:
            raise ValueError(f"{name}: example= is an input of the model, so params must be the model")
        ((_, model),) = modules
        inputs = example if isinstance(example, tuple) else (example,)
        buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
        devices = [t.device for t in inputs if isinstance(t, Tensor) and t.is_cuda]
        count = next(len(t) for t in inputs if isinstance(t, Tensor))
        try:
            with torch.random.fork_rng(devices), torch.enable_grad(), keeping_modes(model):
                self.target = torch.zeros(count, dtype=torch.long)
                model.train()(*inputs)
        finally:
            self.target = self._checked = None
            self.discard()
            with torch.no_grad():
                for buffer, value in buffers:
                    buffer.copy_(value)

    # -- one pass -----------------------------------------------------------------------------------------------

    def _gates_behind(self, x: Tensor) -> Gates:
        """None for an input of the network."""
        return Gates() if x.grad_fn is None else gates_behind(x.grad_fn, self._recorder.reach)

    def _enter(self, synapse: Synapse, x: Tensor) -> Tensor:
        if in_backward():  # activation checkpointing runs the layer again
            return detached(x)
        if x.grad_fn is None:
            return x
        behind, mine = gates_behind(x.grad_fn, self._recorder.reach), self._blocks.get(synapse)
        inner = {g for g in behind.open if mine and mine.named and self._blocks.get(g.pending.synapse) is mine}
        if ending := behind.open - inner:
            self._end_blocks(ending, inner, behind, synapse, x)
        return detached(x) if not inner and (behind.open or behind.shut) else x

    def _end_blocks(self, ending: Iterable[Any], inner: set[Any], behind: Gates, synapse: Synapse, x: Tensor) -> None:
        """Learn from the loss of the blocks whose activity is ``x``, and let no further gradient into them."""
        pending: list[Pending] = [gate.pending for gate in ending]
        for one in pending:
            if one.synapse not in self._blocks:
                raise RuntimeError(
                    f"{type(self).__name__}: layer '{one.synapse.name}' is last in registration order, and so taken "
                    f"for the readout, but its activity enters layer '{synapse.name}': name the blocks, all layers but "
                    "the readout, by blocks="
                )
        blocks = sorted({self._blocks[one.synapse] for one in pending}, key=lambda block: block.synapses[0].index)
        for gate in inner:  # these layers have not ended
            gate.kept = False
        grads = self._at_end(blocks, behind, x, synapse.channel_dim) if self._can_learn() else None
        for gate in inner:
            gate.kept = True
        shut_gates(ending, x.grad_fn, behind)
        share = Share(tuple(blocks), grads, at_once=not self._waits())
        for one in pending:
            one.contribution = share
        if share.at_once:
            self._counted.append(share)

    def _no_target(self) -> str:
        return (
            f"{type(self).__name__} learns from labels, but optimizer.target was not set: write optimizer.target = "
            "labels before each forward pass"
        )

    def _can_learn(self) -> bool:
        return self.target is not None or not self.needs_target

    def _head_parameters(self, block: Block) -> list[nn.Parameter]:
        return list(self._owned[block.name].parameters()) if block.name in self._owned else []

    def _waits(self) -> bool:
        """Whether updates count only when a backward pass reaches them."""
        readout = self._readout_synapse
        return readout.layer.training and readout.weight.requires_grad

    def _leave(self, firing: Firing, u: Tensor) -> Tensor:
        if firing.replay or not (torch.is_grad_enabled() and u.requires_grad):
            return u
        if firing.synapse.layer in self._readout.layers and not self._phase:
            return self._readout.leave(firing, u)
        reach, pending = self._recorder.reach, self._recorder.reach.pending(firing.synapse)
        token = reach.token(firing.x, pending)
        return u if token is None else reach.gate(u, pending, token)

    def _count(self, pending: Pending) -> None:
        """Count the share of a firing that a backward pass has reached."""
        if pending.synapse.is_readout:
            self._readout.confirm(pending)
        share: Any = pending.contribution
        if share is not None and not share.learned and all(share is not other for other in self._counted):
            self._counted.append(share)

    def begin(self) -> None:
        """Start an evaluation that alone will count."""
        self._counted.clear()
        if not self._phase:
            self._readout.clear()
        super().begin()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As in torch; also drops the updates that backward passes have reached since the last step."""
        super().zero_grad(set_to_none)
        self._counted = [share for share in self._counted if share.at_once]
        self._readout.drop()

    def discard(self) -> None:
        """Drop all passes since the last step, whether or not a backward pass has reached them."""
        super().discard()
        self._counted.clear()
        self._readout.clear()

    def gradient_parameters(self) -> list[Tensor]:
        """All parameters of the model that are not frozen; those of blocks get no gradient from the loss."""
        return self._of_model()

    @torch.no_grad()
    def _gathered(self, losses: Tensor | None) -> tuple[dict[Tensor, Tensor], dict[str, Any]]:
        """The gradients of each block's loss, and the readout's, averaged over ranks; and the new state."""
        name, recorder = type(self).__name__, self._recorder
        if not recorder.fired:
            raise RuntimeError(self._coverage.none_fired())
        from_loss = {p: p.grad for p in self.gradient_parameters() if p.grad is not None}
        if self._waits() and not from_loss:
            raise RuntimeError(
                f"{name}: the readout '{self._readout_synapse.name}' learns from the loss, but no gradient has reached "
                "it: call loss.backward() before step(), or give step() a closure that returns the loss"
            )
        try:
            silent = self._silent()  # in evaluation mode, inside the graph of the block that reaches past them
            grads = {p: g for p, g in self._local_gradients().items() if p not in silent}
            of_synapses = {p for s in recorder.synapses.values() for p in s.parameters()}
            of_readout = {*self._readout.parameters()}
            for p, g in from_loss.items():
                if p in of_readout or p in silent:
                    continue
                if p not in grads:
                    grads[p] = g
                elif p in of_synapses:  # a layer that is the readout, too; others learn from the loss of their block
                    grads[p] = grads[p] + g
            self._look_for_blocks_that_did_not_end(grads)
            self._average_gradients(losses, grads)
            for share in self._counted:
                share.learned = True
            state = self._next_state()
            self._readout_grads = self._readout.collect(self._sum_over_ranks, self._ranks[1], self._samples, state)
            return grads | self._readout_grads, state
        finally:
            self._counted.clear()
            self._readout.clear()
            self.target = self._checked = None  # an old target must not teach a new batch

    def _local_gradients(self) -> dict[Tensor, Tensor]:
        """The gradients of the losses of all blocks that count."""
        grads: dict[Tensor, Tensor] = {}
        for share in self._counted:
            if share.grads is None:
                raise RuntimeError(self._no_target())
            add_up(grads, share.grads.items())
        return grads

    def _look_for_blocks_that_did_not_end(self, grads: dict[Tensor, Tensor]) -> None:
        """Warn once of blocks that ran and learn nothing."""
        fired = {self._blocks[s] for s in self._recorder.fired if s in self._blocks}
        ended = {block for share in self._counted for block in share.blocks}
        lost = [
            block
            for block in self._blocks.values()
            if block in fired - ended - self._warned_of
            and not any(p in grads for s in block.synapses for p in s.parameters())
        ]
        if lost:
            self._warned_of |= {*lost}
            names = ", ".join(f"'{s.name}'" for block in dict.fromkeys(lost) for s in block.synapses)
            warn(
                f"{type(self).__name__}: layers ran and learn nothing: {names}. Their activity reaches neither another "
                "layer nor the loss with a graph; checkpoint(..., use_reentrant=True) and steps without a derivative "
                "leave none. exclude=[...] leaves layers out without this warning"
            )
