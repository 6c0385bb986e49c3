"""e-prop: the online rule by hand in double precision, both modes, recurrent layers, bad input."""

from __future__ import annotations

import copy
import gc
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

import bioopt
from bioopt.nn import ALIF, LIF

from ..rules import hooks, same, weights
from .networks import (
    CELLS,
    NEURONS,
    OUTPUTS,
    Recurrent,
    build,
    by_hand,
    detached,
    gradients,
    loss_of,
    network,
    online,
    problem,
)

FEEDBACK = ("symmetric", "random", "adaptive")
every_cell = pytest.mark.parametrize("cell", CELLS)


def close(found: dict[str, Tensor], wanted: dict[str, Any]) -> None:
    assert found.keys() == wanted.keys()
    for name, gradient in found.items():
        expected = torch.as_tensor(wanted[name], dtype=torch.float64)
        torch.testing.assert_close(gradient, expected, rtol=1e-10, atol=1e-12, msg=lambda m, name=name: f"{name}: {m}")


@every_cell
@pytest.mark.parametrize("leaky", [False, True])
def test_it_is_the_online_rule_by_hand(cell: str, leaky: bool) -> None:
    model, (xs, target) = network(cell, leaky), problem()
    optimizer = build(model, feedback="random")
    for _ in range(2):  # recurrent layers are found in the first pass
        optimizer.zero_grad()
        loss_of(model(xs), target).backward()
        optimizer.estimate()
    feedback = optimizer.feedback_weights()
    assert [*feedback] == ["out"]
    wanted = by_hand(cell, leaky, model, feedback["out"], xs, target)
    assert any(abs(value) > 0.01 for row in wanted["recurrent.0.weight"] for value in row)
    close(gradients(model), wanted)


@every_cell
@pytest.mark.parametrize("leaky", [False, True])
@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("feedback", FEEDBACK)
def test_both_modes_agree(cell: str, leaky: bool, layers: int, feedback: str) -> None:
    models = [network(cell, leaky, layers) for _ in range(2)]
    whole, stepwise = build(models[0], feedback=feedback), build(models[1], feedback=feedback, online=True)
    for i in range(2):
        xs, target = problem(i)
        for optimizer in (whole, stepwise):
            optimizer.zero_grad()
        loss_of(models[0](xs), target).backward()
        online(stepwise, models[1], xs, target)
        for optimizer in (whole, stepwise):
            optimizer.step()
        for a, b in zip(
            [*weights(models[0]), *whole.feedback_weights().values()],
            [*weights(models[1]), *stepwise.feedback_weights().values()],
            strict=True,
        ):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_both_modes_agree_on_spiking_readouts() -> None:
    models = [network("ALIF", leaky=True) for _ in range(2)]
    for model in models:
        model.readout = LIF(5.0)
    xs, target = problem()
    whole, stepwise = build(models[0]), build(models[1], online=True)
    loss_of(models[0](xs), target).backward()
    whole.estimate()
    online(stepwise, models[1], xs, target)
    stepwise.estimate()
    close(gradients(models[1]), gradients(models[0]))
    assert gradients(models[0])["recurrent.0.weight"].any()


@pytest.mark.parametrize("closure", [False, True])
def test_a_step_may_be_taken_within_a_sequence(closure: bool) -> None:
    """The traces stay: only the gradient is used up."""
    model, (xs, target) = network("ALIF"), problem()
    optimizer = build(model, online=True)
    optimizer.reset()
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    total = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    state = None
    for x, y in zip(xs, target, strict=True):
        optimizer.zero_grad()
        output, state = model.step(x, detached(state)) if not closure else (None, state)
        if output is None:

            def evaluate(x: Tensor = x, y: Tensor = y) -> Tensor:
                nonlocal state
                output, state = model.step(x, detached(state))
                return loss_of(output, y)

            optimizer.step(evaluate)
        else:
            loss_of(output, y).backward()
            optimizer.step()
        for name, gradient in gradients(model).items():
            total[name] += gradient
    twin = network("ALIF")
    whole = build(twin)
    loss_of(twin(xs), target).backward()
    whole.estimate()
    close(gradients(twin), total)


@pytest.mark.parametrize(
    ("cell", "lengths"),
    [
        ("LIF", (5, 25)),
        ("ALIF", (5, 25)),
        pytest.param("LIF", (100, 1000), marks=pytest.mark.slow),
        pytest.param("ALIF", (100, 1000), marks=pytest.mark.slow),
    ],
)
def test_memory_does_not_grow_with_time(cell: str, lengths: tuple[int, int]) -> None:
    """Of all tensors alive after a sequence."""
    model = network(cell, leaky=True)
    optimizer, found = build(model, online=True), []
    for steps in lengths:
        xs, target = problem(steps=steps)
        online(optimizer, model, xs, target)
        optimizer.zero_grad()
        del xs, target
        gc.collect()
        alive = [o for o in gc.get_objects() if issubclass(type(o), Tensor) and not is_lazy(o)]
        found.append((len(alive), sum(o.numel() for o in alive)))
        del alive
    assert found[1] == found[0]


def test_a_closure_may_run_a_whole_sequence() -> None:
    results = []
    for closure in (False, True):
        model, (xs, target) = network("ALIF", leaky=True), problem()
        optimizer = build(model, online=True)

        def run(optimizer: Any = optimizer, model: Any = model, xs: Tensor = xs, target: Tensor = target) -> Tensor:
            optimizer.zero_grad()
            online(optimizer, model, xs, target)
            return torch.zeros(())

        if closure:
            optimizer.step(run)
        else:
            run()
            optimizer.step()
        results.append(weights(model))
    assert same(*results)


def test_hooks_go_with_the_optimizer() -> None:
    model, (xs, target) = network("ALIF", leaky=True), problem()
    optimizer = build(model, online=True)
    online(optimizer, model, xs, target)
    optimizer.reset()
    output, _ = model.step(xs[0])
    gc.disable()
    try:
        del optimizer  # nothing in it, or in the graph, refers back to it
        assert hooks(model) == 0
    finally:
        gc.enable()
    loss_of(output, target[0]).backward()


def test_half_precision_has_traces_in_full() -> None:
    xs, target = problem()
    found = []
    for amp in (False, True):
        model = network("ALIF").float()
        optimizer = build(model, online=True)
        with torch.autocast("cpu", torch.bfloat16, enabled=amp):
            online(optimizer, model, xs.float(), target.float())
        optimizer.estimate()
        found.append(torch.cat([g.flatten() for g in gradients(model).values()]))
    assert F.cosine_similarity(*found, 0) > 0.8


def test_traces_of_neurons_that_are_alike_take_one_row() -> None:
    xs, target = problem()
    for cell, rows in (("LIF", [1]), ("rate", [1]), ("ALIF", [1, NEURONS])):
        model = network(cell)
        optimizer = build(model, online=True)
        online(optimizer, model, xs, target)
        assert optimizer._traces is not None
        (traces,) = optimizer._traces._traces.values()
        assert all([row.shape[1] for row in of_layer] == rows for of_layer in traces.values())


def test_symmetric_feedback_without_recurrence_is_the_gradient() -> None:
    """Of one layer, whose neurons act on the loss in their own time step alone."""
    for cell in CELLS:
        models = [network(cell, leaky=True) for _ in range(2)]
        for model in models:
            model.recurrent[0].weight.data.zero_()
            model.recurrent[0].requires_grad_(False)
        xs, target = problem()
        optimizer = build(models[0])
        for model in models:
            loss_of(model(xs), target).backward()
        optimizer.estimate()
        close(
            {n: g for n, g in gradients(models[0]).items() if "recurrent" not in n},
            {n: g for n, g in gradients(models[1]).items() if "recurrent" not in n},
        )


def test_recurrent_layers_are_found() -> None:
    class TopDown(nn.Module):
        """The upper layer acts on the lower one, whose own recurrence is named first."""

        def __init__(self) -> None:
            super().__init__()
            self.down, self.enter, self.up, self.out = (nn.Linear(a, b) for a, b in ((4, 4), (3, 4), (4, 4), (4, 2)))

        def forward(self, xs: Tensor) -> Tensor:
            h, ys = xs.new_zeros(xs.shape[1], 4), []
            for x in xs:
                h = torch.tanh(self.up(torch.tanh(self.down(h) + self.enter(x))))
                ys.append(self.out(h))
            return torch.stack(ys)

    for model, wanted in ((network("LIF", layers=2), {"recurrent.0", "recurrent.1"}), (TopDown().double(), {"down"})):
        optimizer = build(model)
        model(problem()[0])
        assert {s.name for s in optimizer._sequence.recurrent} == wanted
        optimizer.close()


def test_no_error_passes_through_recurrent_layers() -> None:
    """Weights of the recurrence act on the update by activity alone: not if they change where nothing is active."""
    xs, target = problem()
    updates = []
    for changed in (False, True):
        model = network("LIF")
        optimizer = build(model)
        silent = model(xs)
        with torch.no_grad():
            spikes = torch.stack(seen(model, xs))
            assert spikes.any()
            if changed:  # a direction that no activity has: outputs and errors stay, backpropagation's update does not
                active = spikes.flatten(0, 1)
                basis = torch.linalg.svd(active.mT @ active).U
                null = basis[:, torch.linalg.matrix_rank(active) :]
                assert null.shape[1]
                model.recurrent[0].weight += null[:, :1].mT
        optimizer.discard()
        loss_of(model(xs), target).backward()
        optimizer.estimate()
        torch.testing.assert_close(silent, model(xs))
        optimizer.discard()
        loss_of(model(xs), target).backward()
        optimizer.estimate()
        updates.append(gradients(model))
    close(updates[0], updates[1])


def seen(model: Recurrent, xs: Tensor) -> list[Tensor]:
    found: list[Tensor] = []
    handle = model.out.register_forward_hook(lambda layer, args, output: found.append(args[0]))
    model.eval()
    model(xs)
    model.train()
    handle.remove()
    return found


def test_recurrent_layers_can_be_named() -> None:
    xs, target = problem()
    found = []
    for recurrent in (None, "recurrent.0", []):
        model = network("rate")
        named = build(model, recurrent=recurrent)
        for _ in range(2):
            named.zero_grad()
            loss_of(model(xs), target).backward()
            named.estimate()
        found.append(gradients(model))
    close(found[0], found[1])
    assert not torch.equal(found[0]["inputs.0.weight"], found[2]["inputs.0.weight"])


class Batched(Recurrent):
    """The readout runs once, on all time steps: steps × samples, or samples × steps."""

    along = 0

    def forward(self, xs: Tensor) -> Tensor:
        state, zs = None, []
        for x in xs:
            _, state = self.step(x, state)
            zs.append(state[-2][0])
        return self.out(torch.stack(zs, self.along))


@pytest.mark.parametrize("along", [0, 1])
def test_the_readout_may_run_once_on_all_time_steps(along: int) -> None:
    xs, target = problem()
    results = []
    for kind in (Recurrent, Batched):
        model = network("LIF", layers=2)
        model.__class__ = kind
        model.along = along
        optimizer = build(model, feedback="random")
        if kind is Batched:
            model.step = lambda x, state, model=model: without_readout(model, x, state)
        output = model(xs)
        loss_of(output if kind is Recurrent or not along else output.transpose(0, 1), target).backward()
        optimizer.estimate()
        results.append(gradients(model))
    close(*results)


def without_readout(model: Any, x: Tensor, state: Any) -> tuple[None, Any]:
    new, h = [], x
    for i in range(2):
        z, own = (x.new_zeros(len(x), NEURONS), None) if state is None else state[i]
        h, own = model.cells[i](model.inputs[i](h) + model.recurrent[i](z), own)
        new.append((h, own))
    return None, [*new, None]


def test_adaptive_feedback_becomes_the_forward_weights() -> None:
    model = network("rate")
    optimizer = bioopt.EProp(model, 0.01, feedback="adaptive", decay=0.5, descent=torch.optim.SGD)
    xs, target = problem()

    def learn() -> Tensor:
        optimizer.zero_grad()
        loss_of(model(xs), target).backward()
        optimizer.step()
        return model.out.weight.detach() - optimizer.feedback_weights()["out"]

    gap = learn()
    for _ in range(10):
        left = learn()
    torch.testing.assert_close(left, gap * (1 - 0.01 * 0.5) ** 10, rtol=1e-9, atol=1e-12)


def test_feedback_weights_have_one_matrix_for_each_layer_of_neurons() -> None:
    for feedback in FEEDBACK:
        model = network("LIF", layers=2)
        optimizer = build(model, feedback=feedback)
        with pytest.raises(RuntimeError, match="known after the first"):
            optimizer.feedback_weights()
        loss_of(model(problem()[0]), problem()[1]).backward()
        found = optimizer.feedback_weights()
        assert {name: (*b.shape,) for name, b in found.items()} == {
            "inputs.1": (OUTPUTS, NEURONS),
            "out": (OUTPUTS, NEURONS),
        }
        assert torch.equal(found["out"], model.out.weight) == (feedback == "symmetric")


def test_neurons_of_snntorch() -> None:
    snntorch = pytest.importorskip("snntorch")
    xs, target = (value.float() for value in problem())
    for kind in ("Leaky", "Synaptic"):
        results = []
        for mode in ("whole", "online", "backpropagation"):
            model = network("LIF").float()  # in which the spikes of snntorch are
            options = {"beta": 0.8} if kind == "Leaky" else {"alpha": 0.7, "beta": 0.8}
            model.cells[0] = Adapter(getattr(snntorch, kind)(**options, reset_mechanism="none"))
            optimizer = build(model, online=mode == "online") if mode != "backpropagation" else None
            if mode == "online":
                online(optimizer, model, xs, target)
            else:
                loss_of(model(xs), target).backward()
            if optimizer is not None:
                optimizer.estimate()
            results.append(gradients(model))
        for name, gradient in results[0].items():
            torch.testing.assert_close(gradient, results[1][name], rtol=1e-5, atol=1e-5)
        assert not torch.allclose(results[0]["inputs.0.weight"], results[2]["inputs.0.weight"])
        assert results[0]["inputs.0.weight"].any()


class Adapter(nn.Module):
    """Neurons with several states as one state."""

    def __init__(self, neurons: Any) -> None:
        super().__init__()
        self.neurons = neurons

    def forward(self, u: Tensor, state: Any = None) -> tuple[Tensor, Any]:
        count = 2 if type(self.neurons).__name__ == "Synaptic" else 1
        z, *state = self.neurons(u, *(state or [torch.zeros_like(u) for _ in range(count)]))
        return z, state


# -- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [nn.RNN, nn.LSTM, nn.GRU, nn.LSTMCell])
def test_fused_layers_are_refused(kind: type[nn.Module]) -> None:
    model = nn.ModuleDict({"memory": kind(3, 4), "out": nn.Linear(4, 2)})
    with pytest.raises(
        ValueError, match=rf"EProp cannot train layer 'memory' of type {kind.__name__} .*LeakyRate, LIF"
    ):
        bioopt.EProp(model)
    optimizer = bioopt.EProp(model, exclude=["memory"])
    assert set(optimizer.coverage(model).values()) == {"excluded", "EProp"}


def test_bad_options_are_named() -> None:
    with pytest.raises(ValueError, match="EProp: feedback='transposed' must be one of symmetric, random, adaptive"):
        bioopt.EProp(network("LIF"), feedback="transposed")
    with pytest.raises(ValueError, match=r"EProp: recurrent='hidden' is not a layer.* it trains inputs\.0, recurrent"):
        bioopt.EProp(network("LIF"), recurrent=["recurrent.0", "hidden"])
    with pytest.raises(ValueError, match="EProp: online='yes' must be True or False"):
        bioopt.EProp(network("LIF"), online="yes")  # type: ignore[arg-type]


def test_feedback_of_another_network_is_named() -> None:
    def learned() -> tuple[nn.Module, bioopt.EProp]:
        model = network("LIF")
        return model, build(model, feedback="adaptive")

    xs, target = problem()
    model, optimizer = learned()
    loss_of(model(xs), target).backward()
    optimizer.step()
    state = copy.deepcopy(optimizer.state_dict())
    state["state"]["rule"]["owned"]["2/out.weight"] = torch.zeros(OUTPUTS, NEURONS + 1, dtype=torch.float64)
    model, optimizer = learned()
    optimizer.load_state_dict(state)
    with pytest.raises(
        RuntimeError, match=r"EProp: the feedback weights of layer 'out' .*\(2, 6\), .* must be \(2, 5\): load"
    ):
        loss_of(model(xs), target).backward()


def test_a_network_without_time_warns_once() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    optimizer, before = bioopt.EProp(model), weights(model)
    x, y = torch.randn(6, 3), torch.randint(2, (6,))
    with pytest.warns(UserWarning, match="EProp: every layer fired once, so the network has no time.*direct feedback"):
        optimizer.step(lambda: F.cross_entropy(model(x), y))
    optimizer.step(lambda: F.cross_entropy(model(x), y))
    assert not any(torch.equal(a, b) for a, b in zip(before, weights(model), strict=True))


def test_a_readout_that_feeds_back_is_named() -> None:
    class Closed(Recurrent):
        def forward(self, xs: Tensor) -> Tensor:
            state, y, ys = None, xs.new_zeros(xs.shape[1], OUTPUTS), []
            for x in xs:
                y, state = self.step(torch.cat([x[:, :1], self.passed(y)], 1), state)
                ys.append(y)
            return torch.stack(ys)

        def passed(self, y: Tensor) -> Tensor:
            return y

    (xs, target), model = problem(), network("LIF")
    model.__class__ = Closed
    optimizer, before = build(model), weights(model)
    loss_of(model(xs), target).backward()
    with pytest.raises(RuntimeError, match=r"EProp: the readout 'out' feeds back into the network.*detach"):
        optimizer.step()
    assert same(before, weights(model))
    model.passed = lambda y: y.detach()
    optimizer.close()
    optimizer = build(model)
    loss_of(model(xs), target).backward()
    optimizer.step()


def test_a_layer_that_is_recurrent_in_part_is_named() -> None:
    class Joined(nn.Module):
        """The second layer has one Linear for its input and its recurrence; the first one may."""

        def __init__(self) -> None:
            super().__init__()
            self.first, self.second, self.out = nn.Linear(3 + 4, 4), nn.Linear(4 + 4, 4), nn.Linear(4, 2)

        def forward(self, xs: Tensor) -> Tensor:
            a = b = xs.new_zeros(xs.shape[1], 4)
            for x in xs:
                a = torch.tanh(self.first(torch.cat([x, a], 1)))
                b = torch.tanh(self.second(torch.cat([a, b], 1)))
            return self.out(b)

    model = Joined().double()
    optimizer = build(model)
    with pytest.raises(RuntimeError, match=r"EProp: layer 'second' receives its own earlier output together with"):
        model(problem()[0])
    assert {s.name for s in optimizer._sequence.recurrent} == {"first"}


def test_mistakes_in_the_online_loop_are_named() -> None:
    xs, target = problem()
    model = network("ALIF")
    optimizer, before = build(model, online=True), weights(model)
    optimizer.reset()
    output, state = model.step(xs[0])
    loss_of(output, target[0]).backward()
    with pytest.raises(RuntimeError, match=r"input of layer 'recurrent\.0' depends on its own earlier output: detach"):
        model.step(xs[1], state)
    optimizer.reset()
    output, ((z, own), _) = model.step(xs[0])
    with pytest.raises(RuntimeError, match=r"a state that ALIF receives has a graph: detach"):
        model.step(xs[1], [(z.detach(), own), None])
    optimizer.reset()
    output, state = model.step(xs[0])
    with pytest.raises(RuntimeError, match=r"ALIF starts a new sequence, .* call optimizer\.reset\(\)"):
        model.step(xs[1])
    optimizer.reset()
    model.step(xs[0])
    with pytest.raises(RuntimeError, match=r"input of ALIF has the shape \(2, 5\), .* traces are of 3 samples"):
        model.step(xs[1, :2], detached([(v[:2], type(s)(*(r[:2] for r in s))) for v, s in state[:1]] + [None]))
    optimizer.discard()
    online(optimizer, model, xs, target)  # and it goes on
    assert same(before, weights(model))
    optimizer.step()
    optimizer.reset()
    model.step(xs[0])
    with pytest.warns(UserWarning, match="EProp: every layer fired once"):
        optimizer.reset()


class Inline(nn.Module):
    """Its neurons are no module."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.out = nn.Linear(3, 4), nn.Linear(4, 2)

    def step(self, x: Tensor, v: Any = None) -> tuple[Tensor, Tensor]:
        v = self.enter(x) if v is None else 0.5 * v + self.enter(x)
        return self.out(torch.tanh(v)), v


class Hidden(nn.Module):
    """Neurons that keep their state inside."""

    v: Any = None

    def forward(self, u: Tensor) -> Tensor:
        self.v = u if self.v is None else 0.5 * self.v.detach() + u
        return torch.tanh(self.v)


class Coupled(nn.Module):
    """Neurons that inhibit each other."""

    def forward(self, u: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
        v = u - u.mean(-1, keepdim=True)
        v = v if state is None else 0.5 * state + v
        return torch.tanh(v), v


def test_networks_that_traces_cannot_train_are_named() -> None:
    xs, target = problem()
    optimizer = bioopt.EProp(Inline().double(), online=True)
    model: Any = next(iter(optimizer._known.roots))
    loss_of(model.step(xs[0])[0], target[0]).backward()
    with pytest.raises(RuntimeError, match="no neurons with a state were found"):
        optimizer.step()
    for neurons, message in (
        (Hidden(), "Hidden keeps its state inside"),
        (Coupled(), "'Coupled' receives must depend"),
    ):
        model = network("LIF")
        model.cells[0] = neurons
        optimizer = build(model, online=True)
        u = model.inputs[0](xs[0])
        with pytest.raises(RuntimeError, match=message):
            neurons(u)
        optimizer.close()
    model = network("LIF", leaky=True)
    model.readout = ALIF(5.0)
    optimizer = build(model, online=True)
    with pytest.raises(
        RuntimeError, match=r"the readout 'out' must have one state, linear.*LeakyRate\(activation=None\)"
    ):
        online(optimizer, model, xs, target)
    with pytest.raises(ValueError, match=r"EProp\(online=True\) trains .* Linear layers alone: .*exclude=\['0.weight"):
        bioopt.EProp(nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(8, 2)), online=True)


def test_a_leaky_readout_reads_neurons() -> None:
    class Normalised(Recurrent):
        def step(self, x: Tensor, state: Any = None) -> tuple[Tensor, Any]:
            h, own = self.cells[0](self.inputs[0](x), None if state is None else state[0])
            y, of_readout = self.readout(self.out(F.layer_norm(h, (NEURONS,))), None if state is None else state[1])
            return y, [own, of_readout]

    model = network("rate", leaky=True)
    model.__class__ = Normalised
    model.recurrent = nn.ModuleList()
    optimizer = build(model, online=True)
    with pytest.raises(RuntimeError, match="layer 'out' must receive the output of neurons itself"):
        online(optimizer, model, *problem())
