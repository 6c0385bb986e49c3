"""Short-term memory: both forms against slow reference implementations, their relation, and errors."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from bioopt.nn import FastWeights, ShortTermMemory

from ..rules import mlp

SIZE, VALUE, BATCH, STEPS = 6, 4, 3, 12
BOTH = [
    ShortTermMemory(SIZE, VALUE),
    ShortTermMemory(SIZE, VALUE, capacity=None, decay=0.5, inverse_temperature=None),
    FastWeights(SIZE, VALUE),
]


def pairs(steps: int = STEPS, batch: int = BATCH, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Keys, values and strengths, steps × batch × size; in every third step some samples store nothing."""
    generator = torch.Generator().manual_seed(seed)
    draw = [torch.randn(steps, batch, n, generator=generator, dtype=torch.float64) for n in (SIZE, VALUE)]
    strengths = torch.rand(steps, batch, generator=generator, dtype=torch.float64)
    strengths[::3, : batch // 2] = 0
    return draw[0], draw[1], strengths


def stored(memory: Any, keys: Tensor, values: Tensor, strengths: Tensor) -> Any:
    state = None
    for key, value, strength in zip(keys, values, strengths, strict=True):
        state = memory.write(key, value, state, strength)
    return state


def slow_buffer(
    keys: Tensor, values: Tensor, strengths: Tensor, cue: Tensor, capacity: int, decay: float, beta: float | None
) -> list[float]:
    """One sample's buffer as a list of items, read item by item."""
    items: list[dict[str, Any]] = []
    for key, value, strength in zip(keys.tolist(), values.tolist(), strengths.tolist(), strict=True):
        for item in items:
            item["strength"] *= decay
        items.insert(0, {"key": key, "value": value, "strength": strength})
        if len(items) > capacity:
            weakest = min(item["strength"] for item in items)
            items.remove([item for item in items if item["strength"] == weakest][-1])  # of equal ones, the oldest
    similarities = [sum(a * b for a, b in zip(item["key"], cue.tolist(), strict=True)) for item in items]
    if beta is None:
        weights = [item["strength"] * s for item, s in zip(items, similarities, strict=True)]
    else:
        weights = [item["strength"] * math.exp(beta * s) for item, s in zip(items, similarities, strict=True)]
        weights = [weight / sum(weights) for weight in weights]
    return [sum(a * item["value"][j] for a, item in zip(weights, items, strict=True)) for j in range(VALUE)]


@pytest.mark.parametrize("beta", [None, 0.0, 2.0])
@pytest.mark.parametrize("capacity", [1, 4, STEPS, 100])
@pytest.mark.parametrize("decay", [0.0, 0.7, 1.0])
def test_the_buffer_equals_its_reference(beta: float | None, capacity: int, decay: float) -> None:
    keys, values, strengths = pairs()
    strengths[-1] = 0.5  # with decay=0 all other items vanish, and the reference cannot normalise
    cue = pairs(seed=1)[0][0]
    memory = ShortTermMemory(SIZE, VALUE, capacity=capacity, decay=decay, inverse_temperature=beta)
    state = stored(memory, keys, values, strengths)
    assert state.strengths.shape == (BATCH, min(capacity, STEPS))
    for i, read in enumerate(memory.read(cue, state)):
        slow = slow_buffer(keys[:, i], values[:, i], strengths[:, i], cue[i], capacity, decay, beta)
        torch.testing.assert_close(read, torch.tensor(slow, dtype=torch.float64))


def test_fast_weights_equal_their_reference() -> None:
    keys, values, strengths = pairs()
    state = stored(FastWeights(SIZE, VALUE, rate=0.3, decay=0.8), keys, values, strengths)
    for n in range(BATCH):
        for i in range(VALUE):
            for j in range(SIZE):
                synapse = 0.0
                for t in range(STEPS):
                    synapse = 0.8 * synapse + 0.3 * float(strengths[t, n] * values[t, n, i] * keys[t, n, j])
                assert math.isclose(state[n, i, j], synapse, rel_tol=1e-9, abs_tol=1e-12)


def test_reading_fast_weights_attends_to_the_recent_past() -> None:
    """Ba et al.'s equation 2: ``A(t) h = η Σ λ^(t-τ) h(τ) (h(τ)·h)``; this equals a linear buffer without a limit."""
    keys, values, strengths = pairs()
    cue = pairs(seed=1)[0][0]
    fast = FastWeights(SIZE, rate=0.5, decay=0.95)
    attended = torch.zeros_like(cue)
    state = None
    for t, h in enumerate(keys):
        state = fast.write(h, state=state)
        attended += 0.5 * 0.95 ** (STEPS - 1 - t) * h * (h * cue).sum(1, keepdim=True)
    torch.testing.assert_close(fast.read(cue, state), attended)
    fast = FastWeights(SIZE, VALUE, rate=0.5, decay=0.95)
    buffer = ShortTermMemory(SIZE, VALUE, capacity=None, decay=0.95, inverse_temperature=None)
    by_synapses = fast.read(cue, stored(fast, keys, values, strengths))
    by_items = 0.5 * buffer.read(cue, stored(buffer, keys, values, strengths))
    torch.testing.assert_close(by_synapses, by_items)


def test_the_oldest_item_is_displaced_unless_it_is_stronger() -> None:
    memory = ShortTermMemory(SIZE, capacity=2, decay=1.0)
    one, two, three = torch.eye(SIZE)[:3]
    state = None
    for key in (one, two, three):
        state = memory.write(key, state=state)
    assert torch.equal(state.keys, torch.stack([three, two]))
    state = memory.write(one, strength=2.0)
    for key in (two, three):
        state = memory.write(key, state=state)
    assert torch.equal(state.keys, torch.stack([one, three]))


def test_writing_with_strength_0_displaces_nothing() -> None:
    memory = ShortTermMemory(SIZE, capacity=2, decay=0.9)
    one, two, other = torch.eye(SIZE)[:3]
    state = memory.write(two, state=memory.write(one))
    for _ in range(5):
        state = memory.write(other, state=state, strength=0.0)
    assert torch.equal(state.keys, torch.stack([two, one]))
    torch.testing.assert_close(state.strengths, torch.tensor([0.9**5, 0.9**6]))


def test_an_item_is_completed_from_a_part_of_it() -> None:
    patterns = torch.randn(5, 200, generator=torch.Generator().manual_seed(0)).sign() / 200**0.5
    memory = ShortTermMemory(200, inverse_temperature=50.0)
    state = None
    for pattern in patterns:
        state = memory.write(pattern, state=state)
    cues = patterns * (torch.arange(200) < 100)
    for cue, pattern in zip(cues, patterns, strict=True):
        torch.testing.assert_close(memory.read(cue, state), pattern, rtol=0, atol=1e-4)


@pytest.mark.parametrize("memory", BOTH)
def test_an_empty_memory_returns_zeros(memory: Any) -> None:
    keys, values, _ = pairs()
    assert torch.equal(memory.read(keys[0], None), torch.zeros(BATCH, VALUE, dtype=torch.float64))
    state = memory.write(keys[0], values[0], strength=0.0)
    assert torch.equal(memory.read(keys[0], state), torch.zeros(BATCH, VALUE, dtype=torch.float64))


@pytest.mark.parametrize("memory", BOTH)
def test_a_step_reads_before_it_writes_and_does_not_modify_the_old_state(memory: Any) -> None:
    keys, values, strengths = pairs()
    state = stored(memory, keys[:5], values[:5], strengths[:5])
    before = copy.deepcopy(state)
    read, after = memory(keys[5], values[5], state)
    assert torch.equal(read, memory.read(keys[5], before))
    torch.testing.assert_close(after, memory.write(keys[5], values[5], before), rtol=0, atol=0)
    torch.testing.assert_close(state, before, rtol=0, atol=0)


@pytest.mark.parametrize("memory", BOTH)
def test_batches_of_any_shape_give_the_same_results(memory: Any) -> None:
    keys, values, strengths = pairs(batch=6)
    whole = memory.read(keys[0], stored(memory, keys, values, strengths))
    shaped = [t.unflatten(1, (2, 3)) for t in (keys, values, strengths)]
    torch.testing.assert_close(memory.read(shaped[0][0], stored(memory, *shaped)).flatten(0, 1), whole)
    alone = [t[:, 4] for t in (keys, values, strengths)]
    torch.testing.assert_close(memory.read(alone[0][0], stored(memory, *alone)), whole[4])
    rest = [t[:, 4:] for t in (keys, values, strengths)]  # a smaller last batch
    torch.testing.assert_close(memory.read(rest[0][0], stored(memory, *rest)), whole[4:])


@pytest.mark.parametrize("memory", BOTH)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_state_and_reading_have_the_dtype_of_the_patterns(memory: Any, dtype: torch.dtype) -> None:
    keys, values, strengths = (t.to(dtype) for t in pairs())
    state = stored(copy.deepcopy(memory), keys, values, strengths)
    assert {t.dtype for t in (state if isinstance(state, tuple) else [state])} == {dtype}
    assert memory.read(keys[0], state).dtype == dtype


@pytest.mark.parametrize("memory", BOTH)
def test_gradients_flow_through_stored_pairs(memory: Any) -> None:
    keys, values, strengths = (t[:4].clone().requires_grad_() for t in pairs(seed=3))
    cue = pairs(seed=1)[0][0].requires_grad_()

    def read(cue: Tensor, keys: Tensor, values: Tensor, strengths: Tensor) -> Tensor:
        return memory.read(cue, stored(memory, keys, values, strengths + 0.1))

    assert torch.autograd.gradcheck(read, (cue, keys, values, strengths))


def test_a_network_learns_its_keys_through_the_memory() -> None:
    model, memory = mlp(sizes=(5, 8, SIZE)), FastWeights(SIZE, VALUE)
    _, values, _ = pairs()
    inputs = torch.randn(BATCH, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
    losses = []
    for _ in range(30):
        key = model(inputs)
        loss = (memory.read(key, memory.write(key, values[0])) - values[0]).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.1 * losses[0]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ShortTermMemory(8, capacity=0), r"ShortTermMemory: capacity=0 must be an integer >= 1"),
        (lambda: ShortTermMemory(8, capacity=2.5), r"capacity=2.5"),
        (lambda: ShortTermMemory(0), r"size=0 must be an integer >= 1"),
        (lambda: ShortTermMemory(8, True), r"value_size=True must be an integer"),
        (lambda: ShortTermMemory(8, decay=1.1), r"decay=1.1 must be in \[0, 1\]"),
        (lambda: ShortTermMemory(8, decay=math.nan), r"decay=nan must be in \[0, 1\]"),
        (lambda: ShortTermMemory(8, inverse_temperature=-1), r"inverse_temperature=-1 must be a finite number >= 0"),
        (lambda: FastWeights(8, rate=-0.1), r"FastWeights: rate=-0.1 must be a finite number >= 0"),
        (lambda: FastWeights(8, decay="much"), r"decay='much' must be in \[0, 1\]"),
    ],
)
def test_bad_options_are_refused(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("memory", BOTH)
def test_patterns_that_do_not_fit_are_refused(memory: Any) -> None:
    keys, values, strengths = pairs()
    state = stored(memory, keys, values, strengths)
    name = type(memory).__name__
    refused: list[tuple[Any, str]] = [
        (lambda: memory.write(values[0], values[0]), rf"{name}: a key of shape \(3, 4\) does not fit size=6"),
        (lambda: memory.write(keys[0], keys[0]), r"a value of shape \(3, 6\) does not fit value_size=4, its last"),
        (lambda: memory.read(values[0], state), r"a cue of shape \(3, 4\) does not fit size=6"),
        (lambda: memory.read(torch.tensor(1.0), None), r"a cue of shape \(\) does not fit size=6"),
        (lambda: memory.write(keys[0]), r"value=None .* size=6 and value_size=4 differ"),
        (
            lambda: memory.write(keys[0], values[0, :2]),
            r"a value of shape .2, 4. does not fit a key of shape .3, 6.",
        ),
        (
            lambda: memory.write(keys[0, :2], values[0, :2], state),
            r"the state has batch shape .3,. .* state=None",
        ),
        (lambda: memory.read(keys[0, :2], state), r"the state has batch shape \(3,\)"),
        (lambda: type(memory)(9, VALUE).read(torch.zeros(3, 9), state), r"and size 6, but the pattern \(3,\) and 9"),
        (lambda: memory.write(keys[0], values[0], state, -1.0), r"strength must be >= 0, but its minimum is -1"),
        (lambda: memory.write(keys[0], values[0], state, math.nan), r"strength must be >= 0, but its minimum is nan"),
        (lambda: memory.write(keys[0], values[0], state, strengths[:2, 0]), r"strength of shape \(2,\) must be one"),
    ]
    for call, message in refused:
        with pytest.raises(ValueError, match=message):
            call()
    with pytest.raises(TypeError, match=r"the key has type torch.int64: convert it"):
        memory.write(torch.ones(3, SIZE, dtype=torch.long), values[0])


def test_repr() -> None:
    assert repr(BOTH[0]) == ("ShortTermMemory(size=6, value_size=4, capacity=7, decay=0.9, inverse_temperature=8.0)")
    assert repr(BOTH[2]) == "FastWeights(size=6, value_size=4, rate=0.5, decay=0.95)"
