"""Which layers of a network learn together, as one block."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from ..core.synapse import Synapse

__all__ = ["Block", "Share", "divided", "require_apart"]


@dataclass(eq=False)
class Block:
    """Layers that learn from one loss.

    Attributes:
        name: of the block in the model, and of its head.
        synapses: its layers.
        named: whether the user has named it, so that it ends only where its activity enters a layer of another block.
    """

    name: str
    synapses: tuple[Synapse, ...]
    named: bool = False


@dataclass(eq=False)
class Share:
    """What the end of a block contributes to a step.

    Attributes:
        blocks: that ended.
        grads: of their parameters and of the head; ``None`` where the target was missing.
        at_once: whether it counts without a backward pass.
        learned: whether a step has learned from it.
    """

    blocks: tuple[Block, ...]
    grads: dict[Tensor, Tensor] | None
    at_once: bool
    learned: bool = False


def divided(
    rule: str,
    synapses: Sequence[Synapse],
    given: Sequence[str | nn.Module] | None,
    roots: Sequence[tuple[str, nn.Module]],
) -> list[Block]:
    """The blocks, without the readout.

    Args:
        rule: its name.
        synapses: all layers, in registration order.
        given: modules, or their names, each of which is a block; ``None``: each layer is one.
        roots: the modules to look in, with their names.

    Raises:
        ValueError: blocks without layers, that overlap, or that leave out more or less than the readout.
    """
    if given is None:
        return [Block(f"{s.index}.{s.name}", (s,)) for s in synapses[:-1]]
    found, homes = [], dict[Synapse, str]()
    for one in given:
        name, module = _module(rule, one, roots)
        inside = tuple(s for s in synapses if any(s.layer is layer for layer in module.modules()))
        if not inside:
            raise ValueError(f"{rule}: block '{name}' has no plastic layer of its own: leave it out of blocks=")
        if twice := next((s for s in inside if s in homes), None):
            raise ValueError(
                f"{rule}: the blocks '{homes[twice]}' and '{name}' overlap, both have layer '{twice.name}': leave "
                "one of them out of blocks="
            )
        homes |= dict.fromkeys(inside, name)
        found.append(Block(name, inside, named=True))
    rest = [s.name for s in synapses if s not in homes]
    if len(rest) != 1:
        which = f"the layers {', '.join(map(repr, rest))}" if rest else "none"
        raise ValueError(
            f"{rule}: blocks= leaves out {which}, but must leave out exactly one layer, the readout, which learns "
            "from the loss"
        )
    return found


def require_apart(rule: str, readouts: Sequence[Synapse], blocks: Mapping[Synapse, Block], rest: Synapse) -> None:
    """Raise for readouts with a rule of their own that are several, in a block, or share their weights with one.

    Args:
        rule: its name.
        readouts: of the rule.
        blocks: of all layers but one.
        rest: this one.
    """
    if len(readouts) > 1:
        names = ", ".join(f"'{one.name}'" for one in readouts)
        raise ValueError(f"{rule}: readout_layer= names {names}, but it takes one layer")
    for one in readouts:
        if one in blocks:
            raise ValueError(
                f"{rule}: the readout '{one.name}' is in block '{blocks[one].name}'; as blocks= leaves out "
                f"'{rest.name}', write readout_layer='{rest.name}'"
            )
        own = {*one.parameters()}
        if shared := next((s for s in blocks if not own.isdisjoint(s.parameters())), None):
            raise ValueError(
                f"{rule}: the readout '{one.name}' shares its weights with layer '{shared.name}', which learns in a "
                "block: with readout=None they learn from both"
            )


def _module(rule: str, given: str | nn.Module, roots: Sequence[tuple[str, nn.Module]]) -> tuple[str, nn.Module]:
    for prefix, root in roots:
        for name, module in root.named_modules(prefix=prefix):
            if module is given or (not isinstance(given, nn.Module) and name == str(given)):
                return name or type(module).__name__, module
    what = f"a module of type {type(given).__name__}" if isinstance(given, nn.Module) else repr(given)
    raise ValueError(f"{rule}: blocks= names {what}, which is not in the model")
