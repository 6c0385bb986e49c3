"""Short-term memory: a buffer of a few decaying items, and fast weights, its Hebbian form."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import Any, Generic, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

State = TypeVar("State", Tensor, "Items")


class Items(NamedTuple):
    """The items that a `ShortTermMemory` stores for each sample, the strongest first.

    Args:
        keys: batch × items × size.
        values: batch × items × value size.
        strengths: batch × items, each >= 0; an item of strength 0 does not contribute to reading.
    """

    keys: Tensor
    values: Tensor
    strengths: Tensor


class _Memory(nn.Module, ABC, Generic[State]):
    """Base class: stores pairs of key and value, and recalls values from a cue; the caller holds the state."""

    def __init__(self, size: int, value_size: int | None, decay: float) -> None:
        super().__init__()
        self.size = self._integer("size", size, "the number of elements of a key")
        self.value_size = size if value_size is None else value_size
        self._integer("value_size", self.value_size, "the number of elements of a value (None: as a key)")
        self.decay = self._number("decay", decay, 0, 1, "the factor by which strengths decay per step")

    def forward(self, key: Tensor, value: Tensor | None = None, state: State | None = None) -> tuple[Tensor, State]:
        """One step, like that of `torch.nn.GRUCell`: read with the key, then store the pair.

        Args:
            key: batch × size; any number of batch dimensions, or none.
            value: batch × value size; ``None``: the key itself, so that a part of it can recall the whole.
            state: the state after the previous step; ``None``: an empty memory.

        Returns:
            The value recalled from ``state``, and the state with the pair stored.
        """
        return self.read(key, state), self.write(key, value, state)

    def read(self, cue: Tensor, state: State | None) -> Tensor:
        """The value recalled from a cue (batch × size): batch × value size; zeros from an empty memory."""
        self._check_pattern("cue", cue, self.size, cue)
        if state is None:
            return cue.new_zeros(*cue.shape[:-1], self.value_size)
        self._check_state(cue, state)
        return self._read(cue, state)

    def write(
        self, key: Tensor, value: Tensor | None = None, state: State | None = None, strength: Tensor | float = 1.0
    ) -> State:
        """The state after one more step: stored items decay, and the pair is added.

        Args:
            key: batch × size.
            value: batch × value size; ``None``: the key itself.
            state: the state after the previous step, which is not modified; ``None``: an empty memory.
            strength: of the new pair, >= 0: one number, or one for each sample; with 0 stored items only decay.
        """
        self._check_pattern("key", key, self.size, key)
        if value is None and self.value_size != self.size:
            raise ValueError(
                f"{self._name}: value=None stores the key as its own value, but size={self.size} and "
                f"value_size={self.value_size} differ: pass a value"
            )
        value = key if value is None else value
        self._check_pattern("value", value, self.value_size, key)
        strengths = torch.as_tensor(strength, dtype=key.dtype, device=key.device)
        if strengths.shape not in (key.shape[:-1], ()):
            raise ValueError(
                f"{self._name}: strength of shape {tuple(strengths.shape)} must be one number, or one for each sample "
                f"of the batch {tuple(key.shape[:-1])}"
            )
        if not bool((strengths >= 0).all()):  # also refuses NaN
            raise ValueError(f"{self._name}: strength must be >= 0, but its minimum is {strengths.min().item():.3g}")
        if state is not None:
            self._check_state(key, state)
        return self._write(key, value, state, strengths.expand(key.shape[:-1]))

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

    def _check_pattern(self, name: str, pattern: Tensor, size: int, key: Tensor) -> None:
        if not pattern.is_floating_point():
            raise TypeError(f"{self._name}: the {name} has type {pattern.dtype}: convert it, for example by .float()")
        if not pattern.ndim or pattern.shape[-1] != size:
            option = "value_size" if name == "value" else "size"
            raise ValueError(
                f"{self._name}: a {name} of shape {tuple(pattern.shape)} does not fit {option}={size}, its last "
                f"dimension: flatten images first, or build {self._name}({option}=...) for this size"
            )
        if pattern.shape[:-1] != key.shape[:-1]:
            raise ValueError(
                f"{self._name}: a {name} of shape {tuple(pattern.shape)} does not fit a key of shape "
                f"{tuple(key.shape)}: all dimensions but the last, the batch, must be equal"
            )

    def _check_state(self, pattern: Tensor, state: State) -> None:
        stored = state if isinstance(state, Tensor) else state.keys
        if stored.shape[:-2] != pattern.shape[:-1] or stored.shape[-1] != self.size:
            raise ValueError(
                f"{self._name}: the state has batch shape {tuple(stored.shape[:-2])} and size {stored.shape[-1]}, but "
                f"the pattern {tuple(pattern.shape[:-1])} and {self.size}: start a new batch with state=None"
            )


class ShortTermMemory(_Memory[Items]):
    r"""A buffer of the most recent items, each with a strength that decays.

    .. math::
        s_i \leftarrow \lambda\, s_i, \qquad
        \hat v(c) = \sum_i a_i v_i, \qquad
        a_i = \frac{s_i\, e^{\beta\, k_i^\top c}}{\sum_j s_j\, e^{\beta\, k_j^\top c}}
        \quad\text{or, linearly,}\quad a_i = s_i\, k_i^\top c

    At each step all strengths :math:`s_i` are multiplied by the decay :math:`\lambda`, and a pair of key :math:`k` and
    value :math:`v` is added with strength 1 or the given one. Beyond the capacity the weakest item is displaced, which
    is the oldest if all were stored with equal strength. A cue :math:`c` recalls the values of the keys similar to it,
    with inverse temperature :math:`\beta`; with L2-normalised keys and cue :math:`k_i^\top c` is a cosine. The module
    has no parameters; gradients flow through keys, values, strengths and cue. It holds no state either, which is
    passed in and out as with `torch.nn.GRUCell`::

        memory, state = bioopt.nn.ShortTermMemory(size=32), None
        for key in keys:                        # batch × size each
            state = memory.write(key, state=state)
        completed = memory.read(cue, state)

    Args:
        size: the number of elements of a key and a cue.
        value_size: the number of elements of a value; ``None``: as a key.
        capacity: the maximum number of items per sample; ``None``: no limit.
        decay: :math:`\lambda`, the factor per step, in [0, 1]; 1 for no decay.
        inverse_temperature: :math:`\beta`; ``None`` for linear reading, as in `FastWeights`.

    Raises:
        ValueError: an option is out of range; the last dimension of a pattern is not ``size`` (of a value,
            ``value_size``), its batch is not that of the state, or a strength is negative.
        TypeError: a pattern is not floating point.

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
        what = "the number of items per sample (None: no limit)"
        self.capacity = None if capacity is None else self._integer("capacity", capacity, what)
        if inverse_temperature is not None:
            what = "the sharpness of reading (None: linear)"
            inverse_temperature = self._number("inverse_temperature", inverse_temperature, 0, math.inf, what)
        self.inverse_temperature = inverse_temperature

    def _read(self, cue: Tensor, state: Items) -> Tensor:
        similarity = (state.keys @ cue.unsqueeze(-1)).squeeze(-1)
        if self.inverse_temperature is None:
            weights = state.strengths * similarity
        else:
            tiny = torch.finfo(cue.dtype).tiny  # a strength of 0 has no logarithm
            weights = (self.inverse_temperature * similarity + state.strengths.clamp(min=tiny).log()).softmax(-1)
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
        # Stable sort: of items of equal strength the newest is kept.
        strengths, order = items.strengths.sort(dim=-1, descending=True, stable=True)
        order, strengths = order[..., : self.capacity], strengths[..., : self.capacity]
        return Items(_reordered(items.keys, order), _reordered(items.values, order), strengths)

    def extra_repr(self) -> str:
        """The options, for ``repr``."""
        return (
            f"size={self.size}, value_size={self.value_size}, capacity={self.capacity}, decay={self.decay}, "
            f"inverse_temperature={self.inverse_temperature}"
        )


def _reordered(items: Tensor, order: Tensor) -> Tensor:
    """The items (batch × items × size) with the indices ``order`` (batch × items)."""
    return items.gather(-2, order.unsqueeze(-1).expand(*order.shape, items.shape[-1]))


class FastWeights(_Memory[Tensor]):
    r"""Fast weights: synapses that store each pair by one Hebbian step, and decay.

    .. math::
        A(t) = \lambda A(t - 1) + \eta\, v\, k^\top, \qquad \hat v(c) = A\, c
        = \eta \sum_{\tau \le t} \lambda^{t - \tau}\, (k(\tau)^\top c)\; v(\tau)

    with the key :math:`k` as presynaptic and the value :math:`v` as postsynaptic activity of a layer that has its own
    weights :math:`A` for each sample, batch × value size × size. Without a value the update is the published one,
    :math:`h h^\top` of an activity :math:`h`. By the sum on the right, reading attends to all stored pairs, weighted by
    recency and similarity to the cue, although no item is kept: it equals :math:`\eta` times the linear reading of a
    `ShortTermMemory` without a limit. Nothing is displaced, but keys that are not orthogonal interfere. Used like
    `ShortTermMemory`.

    Args:
        size: the number of elements of a key and a cue.
        value_size: the number of elements of a value; ``None``: as a key.
        rate: :math:`\eta`, >= 0.
        decay: :math:`\lambda`, the factor per step, in [0, 1].

    Raises:
        ValueError: an option is out of range; the last dimension of a pattern is not ``size`` (of a value,
            ``value_size``), its batch is not that of the state, or a strength is negative.
        TypeError: a pattern is not floating point.

    Source: J. Ba, G. Hinton, V. Mnih, J. Leibo & C. Ionescu (2016), *Using fast weights to attend to the recent past*,
    whose values of rate and decay are the defaults. Their network also has slow weights, trained by backpropagation,
    and reads several times per step.
    """

    def __init__(self, size: int, value_size: int | None = None, *, rate: float = 0.5, decay: float = 0.95) -> None:
        super().__init__(size, value_size, decay)
        self.rate = self._number("rate", rate, 0, math.inf, "the learning rate")

    def _read(self, cue: Tensor, state: Tensor) -> Tensor:
        return (state @ cue.unsqueeze(-1)).squeeze(-1)

    def _write(self, key: Tensor, value: Tensor, state: Tensor | None, strength: Tensor) -> Tensor:
        update = (self.rate * strength.unsqueeze(-1) * value).unsqueeze(-1) * key.unsqueeze(-2)
        return update if state is None else self.decay * state + update

    def extra_repr(self) -> str:
        """The options, for ``repr``."""
        return f"size={self.size}, value_size={self.value_size}, rate={self.rate}, decay={self.decay}"
