"""Short-term memory: a buffer of a few fading items, and its Hebbian form, fast weights."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import Any, Generic, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

State = TypeVar("State", Tensor, "Items")


class Items(NamedTuple):
    """What a `ShortTermMemory` holds of each sample, the strongest item first.

    Args:
        keys: batch × items × size.
        values: batch × items × value size.
        strengths: batch × items, each >= 0; an item of strength 0 is as good as forgotten.
    """

    keys: Tensor
    values: Tensor
    strengths: Tensor


class _Memory(nn.Module, ABC, Generic[State]):
    """What the two forms share: pairs of key and value go in, a cue brings values back; the state is the caller's."""

    def __init__(self, size: int, value_size: int | None, decay: float) -> None:
        super().__init__()
        self.size = self._integer("size", size, "so many numbers make a key")
        self.value_size = size if value_size is None else value_size
        self._integer("value_size", self.value_size, "so many numbers make a value (None: as many as a key)")
        self.decay = self._number("decay", decay, 0, 1, "what a step leaves of a strength")

    def forward(self, key: Tensor, value: Tensor | None = None, state: State | None = None) -> tuple[Tensor, State]:
        """One step, as of `torch.nn.GRUCell`: what the key brings back, and then the state with the pair in it.

        Args:
            key: batch × size; any number of batch dimensions, or none.
            value: batch × value size; ``None``: the key itself, to be completed later from a part of it.
            state: of the step before; ``None``: an empty memory.
        """
        return self.read(key, state), self.write(key, value, state)

    def read(self, cue: Tensor, state: State | None) -> Tensor:
        """What the cue (batch × size) brings back: batch × value size; zeros from an empty memory."""
        self._fits("cue", cue, self.size, cue)
        if state is None:
            return cue.new_zeros(*cue.shape[:-1], self.value_size)
        self._belongs(cue, state)
        return self._read(cue, state)

    def write(
        self, key: Tensor, value: Tensor | None = None, state: State | None = None, strength: Tensor | float = 1.0
    ) -> State:
        """The state after one more step: all that is stored fades, and the pair comes in.

        Args:
            key: batch × size.
            value: batch × value size; ``None``: the key itself.
            state: of the step before; ``None``: an empty memory. It is left as it is.
            strength: how firmly to store the pair, >= 0: a number, or one for each sample; 0 lets time pass alone.
        """
        self._fits("key", key, self.size, key)
        if value is None and self.value_size != self.size:
            raise ValueError(
                f"{self._name}: value=None stores the key as its own value, but size={self.size} and "
                f"value_size={self.value_size} differ: give a value"
            )
        value = key if value is None else value
        self._fits("value", value, self.value_size, key)
        firmly = torch.as_tensor(strength, dtype=key.dtype, device=key.device)
        if firmly.shape not in (key.shape[:-1], ()):
            raise ValueError(
                f"{self._name}: strength of shape {tuple(firmly.shape)} must be one number, or one for each sample of "
                f"the batch {tuple(key.shape[:-1])}"
            )
        if not bool((firmly >= 0).all()):  # nor is nan
            raise ValueError(f"{self._name}: strength from {firmly.min().item():.3g} must be >= 0")
        if state is not None:
            self._belongs(key, state)
        return self._write(key, value, state, firmly.expand(key.shape[:-1]))

    @abstractmethod
    def _read(self, cue: Tensor, state: State) -> Tensor: ...

    @abstractmethod
    def _write(self, key: Tensor, value: Tensor, state: State | None, strength: Tensor) -> State: ...

    @property
    def _name(self) -> str:
        return type(self).__name__

    def _integer(self, name: str, value: Any, what: str) -> int:
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(f"{self._name}: {name}={value!r} must be an integer >= 1: {what}")
        return value

    def _number(self, name: str, value: Any, least: float, most: float, what: str) -> float:
        number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
        if not number or not least <= value <= most:
            range_ = f"in [{least}, {most}]" if math.isfinite(most) else f"a finite number >= {least}"
            raise ValueError(f"{self._name}: {name}={value!r} must be {range_}: {what}")
        return float(value)

    def _fits(self, name: str, pattern: Tensor, size: int, key: Tensor) -> None:
        if not pattern.is_floating_point():
            raise TypeError(f"{self._name}: the {name} is of {pattern.dtype}: make it floating point, by .float() say")
        if not pattern.ndim or pattern.shape[-1] != size:
            option = "value_size" if name == "value" else "size"
            raise ValueError(
                f"{self._name}: a {name} of shape {tuple(pattern.shape)} does not fit {option}={size}, which lies "
                f"along its last dimension: flatten images first, or build {self._name}({option}=...) for such patterns"
            )
        if pattern.shape[:-1] != key.shape[:-1]:
            raise ValueError(
                f"{self._name}: a {name} of shape {tuple(pattern.shape)} comes with a key of shape "
                f"{tuple(key.shape)}: all but the last dimension, the batch, must be the same"
            )

    def _belongs(self, pattern: Tensor, state: State) -> None:
        held = state if isinstance(state, Tensor) else state.keys
        if held.shape[:-2] != pattern.shape[:-1] or held.shape[-1] != self.size:
            raise ValueError(
                f"{self._name}: the state is of a batch {tuple(held.shape[:-2])} and size {held.shape[-1]}, the "
                f"pattern of {tuple(pattern.shape[:-1])} and {self.size}: a batch of sequences begins with state=None"
            )


class ShortTermMemory(_Memory[Items]):
    r"""A buffer of the few items seen last, each with a strength that fades.

    .. math::
        s_i \leftarrow \lambda\, s_i, \qquad
        \hat v(c) = \sum_i a_i v_i, \qquad
        a_i = \frac{s_i\, e^{\beta\, k_i^\top c}}{\sum_j s_j\, e^{\beta\, k_j^\top c}}
        \quad\text{or, linearly,}\quad a_i = s_i\, k_i^\top c

    At each step all strengths :math:`s_i` fade by the decay :math:`\lambda` and a pair of key :math:`k` and value
    :math:`v` comes in at strength 1, or at the one it is given; beyond the capacity the weakest is displaced, which
    is the oldest where all came in alike. A cue :math:`c` brings back the values of the keys that resemble it,
    at the inverse temperature :math:`\beta`; keys of unit length make :math:`k_i^\top c` a cosine. There is nothing to
    train, and gradients flow through keys, values, strengths and cue. The module holds no state: as with
    `torch.nn.GRUCell` it is passed in and out, of whatever batch::

        memory, state = bioopt.nn.ShortTermMemory(size=32), None
        for key in keys:                        # batch × size each
            state = memory.write(key, state=state)
        completed = memory.read(cue, state)

    Args:
        size: of a key and a cue.
        value_size: of a value; ``None``: as a key.
        capacity: how many items of each sample are held; ``None``: all.
        decay: :math:`\lambda`, in [0, 1] a step; 1 for no decay.
        inverse_temperature: :math:`\beta`; ``None`` for linear reading, that of `FastWeights`.

    Raises:
        ValueError: an option out of its range; a pattern whose last dimension is not ``size`` (of a value,
            ``value_size``), another batch than the state's, or a negative strength.
        TypeError: patterns that are not floating point.

    Sources: N. C. Waugh & D. A. Norman (1965), *Primary memory*, for displacement; J. Brown (1958), *Some tests of the
    decay theory of immediate memory*; the default capacity is G. A. Miller's (1956), *The magical number seven, plus
    or minus two*.
    """

    def __init__(
        self,
        size: int,
        value_size: int | None = None,
        *,
        capacity: int | None = 7,
        decay: float = 0.9,
        inverse_temperature: float | None = 8.0,
    ) -> None:
        super().__init__(size, value_size, decay)
        what = "so many items of a sample are held (None: all)"
        self.capacity = None if capacity is None else self._integer("capacity", capacity, what)
        if inverse_temperature is not None:
            what = "the sharpness of reading (None: linear)"
            inverse_temperature = self._number("inverse_temperature", inverse_temperature, 0, math.inf, what)
        self.inverse_temperature = inverse_temperature

    def _read(self, cue: Tensor, state: Items) -> Tensor:
        alike = (state.keys @ cue.unsqueeze(-1)).squeeze(-1)
        if self.inverse_temperature is None:
            weights = state.strengths * alike
        else:
            least = torch.finfo(cue.dtype).tiny  # a strength of 0 has no logarithm
            weights = (self.inverse_temperature * alike + state.strengths.clamp(min=least).log()).softmax(-1)
            weights = weights * (state.strengths > 0)
        return (weights.unsqueeze(-2) @ state.values).squeeze(-2)

    def _write(self, key: Tensor, value: Tensor, state: Items | None, strength: Tensor) -> Items:
        new = Items(key.unsqueeze(-2), value.unsqueeze(-2), strength.unsqueeze(-1))
        if state is None:
            return new
        items = Items(
            torch.cat([new.keys, state.keys], -2),
            torch.cat([new.values, state.values], -2),
            torch.cat([new.strengths, self.decay * state.strengths], -1),
        )
        # Stable, so that of items of the same strength the newer stays.
        strengths, order = items.strengths.sort(dim=-1, descending=True, stable=True)
        order, strengths = order[..., : self.capacity], strengths[..., : self.capacity]
        return Items(_taken(items.keys, order), _taken(items.values, order), strengths)

    def extra_repr(self) -> str:
        """Its options."""
        return (
            f"size={self.size}, value_size={self.value_size}, capacity={self.capacity}, decay={self.decay}, "
            f"inverse_temperature={self.inverse_temperature}"
        )


def _taken(items: Tensor, order: Tensor) -> Tensor:
    """The items (batch × items × size) of these numbers, in their order."""
    return items.gather(-2, order.unsqueeze(-1).expand(*order.shape, items.shape[-1]))


class FastWeights(_Memory[Tensor]):
    r"""Fast weights: synapses that learn each pair by one Hebbian step, and forget.

    .. math::
        A(t) = \lambda A(t - 1) + \eta\, v\, k^\top, \qquad \hat v(c) = A\, c
        = \eta \sum_{\tau \le t} \lambda^{t - \tau}\, (k(\tau)^\top c)\; v(\tau)

    with the key :math:`k` as presynaptic and the value :math:`v` as postsynaptic activity of a layer whose weights
    :math:`A`, batch × value size × size, are each sample's own. Without a value it is :math:`h h^\top` of one activity
    :math:`h`, as published. The sum says what the synapses do without keeping any item: attend to all that was stored,
    the more recent and the more similar to the cue the more; it is :math:`\eta` times the linear reading of a
    `ShortTermMemory` without a limit. Nothing is ever displaced, but keys that are not at right angles blur each other.
    Used as `ShortTermMemory` is.

    Args:
        size: of a key and a cue.
        value_size: of a value; ``None``: as a key.
        rate: :math:`\eta`, >= 0.
        decay: :math:`\lambda`, in [0, 1] a step.

    Raises:
        ValueError: an option out of its range; a pattern whose last dimension is not ``size`` (of a value,
            ``value_size``), another batch than the state's, or a negative strength.
        TypeError: patterns that are not floating point.

    Source: J. Ba, G. Hinton, V. Mnih, J. Leibo & C. Ionescu (2016), *Using fast weights to attend to the recent past*,
    whose values of rate and decay are the defaults. Their network learns slow weights around it by backpropagation, and
    reads several times a step.
    """

    def __init__(self, size: int, value_size: int | None = None, *, rate: float = 0.5, decay: float = 0.95) -> None:
        super().__init__(size, value_size, decay)
        self.rate = self._number("rate", rate, 0, math.inf, "of learning")

    def _read(self, cue: Tensor, state: Tensor) -> Tensor:
        return (state @ cue.unsqueeze(-1)).squeeze(-1)

    def _write(self, key: Tensor, value: Tensor, state: Tensor | None, strength: Tensor) -> Tensor:
        learned = (self.rate * strength.unsqueeze(-1) * value).unsqueeze(-1) * key.unsqueeze(-2)
        return learned if state is None else self.decay * state + learned

    def extra_repr(self) -> str:
        """Its options."""
        return f"size={self.size}, value_size={self.value_size}, rate={self.rate}, decay={self.decay}"
