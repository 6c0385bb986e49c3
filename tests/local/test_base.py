"""Where blocks begin and end, and that no error passes between them, whatever the graph."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable
from itertools import pairwise, product
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils.checkpoint import checkpoint

import bioopt
from bioopt import ForwardForward, LocalContrastive, LocalLoss, LocalPerturbation, MonoForward

from ..rules import batch, cnn, mlp, ordinary, same, weights

SGD: dict[str, Any] = {"descent": torch.optim.SGD}


class Residual(nn.Module):
    """Skips, a layer that runs twice, and normalisation and activation whose parameters several blocks use."""

    def __init__(self, detached: bool = False, checkpointed: bool = False) -> None:
        super().__init__()
        self.detached, self.checkpointed = detached, checkpointed
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.stem, self.a, self.b = (nn.Conv2d(c, 4, 3, padding=1) for c in (2, 4, 4))
            self.first, self.second, self.act = nn.BatchNorm2d(4), nn.BatchNorm2d(4), nn.PReLU()
            self.last, self.head = nn.Conv2d(4, 4, 1), nn.Linear(4, 5)

    def cut(self, x: Tensor) -> Tensor:
        return x.detach() if self.detached else x

    def block(self, x: Tensor) -> Tensor:
        return self.cut(x) + self.second(self.b(self.act(self.a(x))))

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.first(self.stem(x)), inplace=True)
        for _ in range(2):
            x = checkpoint(self.block, x, use_reentrant=False) if self.checkpointed else self.block(x)
        return self.head(self.last(x).mean((2, 3)) + self.cut(x).mean((2, 3)))


def gradients(rule: Any, model: nn.Module, **options: Any) -> dict[str, Tensor]:
    optimizer = rule(model, 0.1, **SGD, **options)
    optimizer.target = batch()[1]
    optimizer.estimate(lambda: F.cross_entropy(model(batch()[0]), batch()[1]))
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    optimizer.close()
    return found


@pytest.mark.parametrize("rule", [LocalLoss, MonoForward, ForwardForward, LocalPerturbation, LocalContrastive])
@pytest.mark.parametrize("build", [Residual, lambda: cnn(dropout=0.0)])
def test_weights_above_a_block_do_not_change_its_update(rule: Any, build: Callable[[], nn.Module]) -> None:
    """The update below stays bit for bit, where backpropagation's changes."""
    names = [name for name, module in build().named_modules() if isinstance(module, nn.Conv2d | nn.Linear)]
    before, true = gradients(rule, build()), backpropagated(build())
    assert {f"{name}.weight" for name in names} <= before.keys() <= true.keys()
    for below, above in pairwise(names):
        changed, twin = build(), build()
        for model in (changed, twin):
            with torch.no_grad():
                model.get_submodule(above).weight.mul_(-1.5)
        name = f"{below}.weight"
        if not (isinstance(changed, Residual) and below == "a"):  # `a` runs above `b`, too
            assert torch.equal(gradients(rule, changed)[name], before[name])
        assert not torch.allclose(backpropagated(twin)[name], true[name])


def backpropagated(model: nn.Module) -> dict[str, Tensor]:
    F.cross_entropy(model(batch()[0]), batch()[1]).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters()}


def test_a_skip_carries_no_error_into_the_blocks_that_it_bypasses() -> None:
    """As in a network whose skips are detached by hand; what both runs of the block share learns in the first."""
    one, two = gradients(LocalLoss, Residual()), gradients(LocalLoss, Residual(detached=True))
    assert one.keys() == two.keys() == dict(Residual().named_parameters()).keys()
    for name in one.keys() - {"act.weight", "second.weight", "second.bias"}:
        assert torch.equal(one[name], two[name]), name


def test_a_layer_that_runs_twice_learns_from_the_loss_of_each_run() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.head = nn.Linear(5, 5), nn.Linear(5, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(torch.tanh(self.layer(x + torch.tanh(self.layer(x)))))

    torch.manual_seed(0)
    model, x, y = Twice(), torch.randn(8, 5), torch.randint(4, (8,))
    optimizer = MonoForward(model, 0.1, **SGD)
    optimizer.target = y
    optimizer.estimate(lambda: F.cross_entropy(model(x), y))
    (projection,) = optimizer._owned.modules.values()
    with torch.no_grad():
        second = x + torch.tanh(model.layer(x))
    losses = [F.cross_entropy(projection(torch.tanh(model.layer(at))), y) for at in (second,)]
    losses.append(
        F.cross_entropy(projection(x + torch.tanh(model.layer(x))), y)
    )  # where the layer's activity enters it
    (expected,) = torch.autograd.grad(sum(losses), model.layer.weight)
    torch.testing.assert_close(model.layer.weight.grad, expected)


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.out, self.head = (nn.Linear(6, n) for n in (6, 6, 6, 6, 4))

    def forward(self, x: Tensor) -> Tensor:
        mixed = F.scaled_dot_product_attention(self.q(x), self.k(x), self.v(x))
        return self.head(self.out(mixed).mean(1))


def test_layers_that_end_together_learn_together() -> None:
    torch.manual_seed(0)
    model, x, y = Attention(), torch.randn(8, 3, 6), torch.randint(4, (8,))
    optimizer = MonoForward(model, 0.1, **SGD)
    optimizer.target = y
    optimizer.estimate(lambda: F.cross_entropy(model(x), y))
    heads = optimizer._owned.modules
    assert [name for name, head in heads.items() if is_lazy(head.weight)] == ["1/k", "2/v"]
    mixed = F.scaled_dot_product_attention(model.q(x), model.k(x), model.v(x))
    loss = F.cross_entropy(heads["0/q"](mixed.flatten(1)), y)
    layers = (model.q, model.k, model.v)
    for layer, expected in zip(layers, torch.autograd.grad(loss, [one.weight for one in layers]), strict=True):
        torch.testing.assert_close(layer.weight.grad, expected)


@pytest.mark.parametrize("blocks", [["0", "body"], "modules"])
def test_named_blocks_are_backpropagated_inside(blocks: Any) -> None:
    torch.manual_seed(0)
    body = nn.Sequential(nn.Linear(5, 7), nn.LayerNorm(7), nn.Tanh(), nn.Linear(7, 5), nn.Tanh())
    model = nn.Sequential()
    model.add_module("0", nn.Linear(6, 5))
    model.add_module("body", body)
    model.add_module("head", nn.Linear(5, 4))
    x, y = torch.randn(8, 6), torch.randint(4, (8,))
    optimizer = MonoForward(model, 0.1, blocks=[model[0], body] if blocks == "modules" else blocks, **SGD)
    assert sorted(optimizer._owned.modules) == ["0", "body"]
    optimizer.target = y
    optimizer.estimate(lambda: F.cross_entropy(model(x), y))
    loss = F.cross_entropy(optimizer._owned.modules["body"](body(model[0](x).detach())), y)
    params = [*body.parameters()]
    for p, expected in zip(params, torch.autograd.grad(loss, params), strict=True):
        torch.testing.assert_close(p.grad, expected)


def test_what_stands_before_the_first_layer_learns_with_it() -> None:
    model = nn.Sequential(nn.BatchNorm1d(6), nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4))
    x, y = torch.randn(8, 6), torch.randint(4, (8,))
    optimizer = MonoForward(model, 0.1, **SGD)
    optimizer.target = y
    optimizer.estimate(lambda: F.cross_entropy(model(x), y))
    assert all(p.grad.any() for p in model[0].parameters())


# -- which passes count -----------------------------------------------------------------------------------------


def updated(run: Callable[[Any, nn.Module, Tensor, Tensor], None]) -> list[Tensor]:
    model = cnn(dropout=0.0)
    model[1].eval()  # whose statistics would tell passes apart, as the means of presynaptic activity would
    optimizer = LocalLoss(model, 0.1, centre_inputs=False, **SGD)
    optimizer.target = batch()[1]
    run(optimizer, model, *batch())
    optimizer.step()
    return weights(model)


def test_a_loss_that_is_thrown_away_teaches_nothing() -> None:
    def backward(optimizer: Any, model: nn.Module, x: Tensor, y: Tensor) -> None:
        F.cross_entropy(model(x), y).backward()

    def thrown_away(optimizer: Any, model: nn.Module, x: Tensor, y: Tensor) -> None:
        model(-x)
        F.cross_entropy(model(-x), y).backward()
        optimizer.zero_grad()
        backward(optimizer, model, x, y)
        model(-x)

    def forward_first(optimizer: Any, model: nn.Module, x: Tensor, y: Tensor) -> None:
        loss = F.cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()

    assert same(updated(backward), updated(thrown_away))
    assert same(updated(backward), updated(forward_first))


def test_gradients_of_several_passes_add_up() -> None:
    def twice(optimizer: Any, model: nn.Module, x: Tensor, y: Tensor) -> None:
        for _ in range(2):
            F.cross_entropy(model(x), y).backward()

    one, two = updated(lambda o, m, x, y: F.cross_entropy(m(x), y).backward()), updated(twice)
    for start, a, b in zip(weights(cnn()), one, two, strict=True):
        torch.testing.assert_close(2 * (a - start), b - start, atol=1e-5, rtol=1e-3)


@pytest.mark.parametrize("rule", [LocalLoss, MonoForward, ForwardForward, LocalPerturbation, LocalContrastive])
def test_activation_checkpointing_changes_nothing(rule: Any) -> None:
    one, two = gradients(rule, Residual()), gradients(rule, Residual(checkpointed=True))
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)


class Again(nn.Module):
    """A layer that runs on the input and on its own activity."""

    def __init__(self, checkpointed: bool) -> None:
        super().__init__()
        self.checkpointed = checkpointed
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.layer, self.above, self.head = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 5)

    def body(self, x: Tensor) -> Tensor:
        for layer in (self.layer, self.layer, self.above):
            x = torch.tanh(layer(x))
        return x

    def forward(self, x: Tensor) -> Tensor:
        return self.head(checkpoint(self.body, x, use_reentrant=False) if self.checkpointed else self.body(x))


@pytest.mark.parametrize(
    ("rule", "option"),
    [(ForwardForward, ""), (ForwardForward, "negatives"), (LocalContrastive, ""), (LocalContrastive, "views")],
)
def test_checkpointing_gives_inputs_the_same_labels_and_views(rule: Any, option: str) -> None:
    """Also those of a function of the user's own that returns others each time; none is kept after the step."""
    x, y = torch.randn(10, 6, generator=torch.Generator().manual_seed(1)), batch()[1]
    found: list[list[Tensor]] = []
    for checkpointed in (False, True):
        generator, kept = torch.Generator().manual_seed(0), list[Any]()

        def other(inputs: Tensor, *labels: Any, generator: Any = generator, kept: list[Any] = kept) -> Tensor:
            given = torch.randn(inputs.shape, generator=generator)
            kept.append(weakref.ref(given))
            return given

        model = Again(checkpointed)
        optimizer = rule(model, **({option: other} if option else {}), **SGD)
        optimizer.target = y
        optimizer.estimate(lambda model=model: F.cross_entropy(model(x), y))
        found.append([p.grad for p in model.parameters()])
        assert len(kept) == bool(option)
        assert all(one() is None for one in kept)
    assert same(*found)


@pytest.mark.parametrize(
    ("rule", "place"),
    [
        *product((LocalLoss, MonoForward, ForwardForward, LocalPerturbation, LocalContrastive), (0, 2)),
        (MonoForward, 4),  # the readout
    ],
)
def test_layers_in_evaluation_mode_do_not_learn(rule: Any, place: int) -> None:
    """Though they stand in the graph of a block that learns."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 5))
    x, y = torch.randn(10, 6), batch()[1]
    optimizer = rule(model, readout=None)
    model[place].eval()
    before = weights(model)
    optimizer.target = y
    with pytest.warns(UserWarning, match=f"did not fire and learn nothing: '{place}'"):
        optimizer.step(lambda: F.cross_entropy(model(x), y))
    moved = [not torch.equal(p, q) for p, q in zip(before, model.parameters(), strict=True)]
    assert moved == [i // 2 * 2 != place for i in range(6)]
    assert model[place].weight.grad is None


@pytest.mark.filterwarnings("ignore")
def test_compiled_gradients_are_the_same() -> None:
    """Under AOT autograd a part of the graph is a single node."""
    torch._dynamo.reset()
    models = [Residual(), Residual()]
    ways = [models[0], torch.compile(models[1], backend="aot_eager")]
    for model, way in zip(models, ways, strict=True):
        optimizer = LocalLoss(model, 0.1, **SGD)
        optimizer.target = batch()[1]
        F.cross_entropy(way(batch()[0]), batch()[1]).backward()
        optimizer.step()
    for a, b in zip(*map(weights, models), strict=True):
        torch.testing.assert_close(a, b)


# -- heads ------------------------------------------------------------------------------------------------------


def values(optimizer: Any) -> list[Tensor]:
    return [p.detach().clone() for p in optimizer._owned.modules.parameters() if not is_lazy(p)]


def test_heads_come_from_the_seed_alone_and_an_example_sizes_them() -> None:
    found = []
    for seed, example in ((0, False), (0, True), (1, True)):
        model = cnn()
        before = [b.clone() for b in model.buffers()]
        torch.manual_seed(len(found))
        state = torch.get_rng_state()
        optimizer = LocalLoss(model, 0.0, seed=seed, example=batch()[0][:3] if example else None)
        assert torch.equal(torch.get_rng_state(), state)
        assert same(before, list(model.buffers()))
        assert len(values(optimizer)) == (4 if example else 0)
        if not example:
            optimizer.step(ordinary(with_target(optimizer), model, *batch()))
        found.append(values(optimizer))
    assert same(found[0], found[1])
    assert not any(torch.equal(a, b) for a, b in zip(found[1], found[2], strict=True))


def with_target(optimizer: Any) -> Any:
    optimizer.target = batch()[1]
    return optimizer


def test_heads_have_a_rate_of_their_own() -> None:
    model = cnn()
    optimizer = LocalLoss(model, 0.1, head_lr=0.0, example=batch()[0])
    assert [group["lr"] for group in optimizer.param_groups] == [0.1, 0.0]
    before = values(optimizer)
    optimizer.step(ordinary(with_target(optimizer), model, *batch()))
    assert same(before, values(optimizer))


# -- bad input --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"blocks": ["0", "1", "4"]}, "block '1' has no plastic layer"),
        ({"blocks": ["", "0"]}, "the blocks 'Sequential' and '0' overlap, both have layer '0'"),
        ({"blocks": ["0"]}, r"blocks= leaves out the layers '4', '8', but must leave out exactly one"),
        ({"blocks": ["0", "4", "8"]}, "blocks= leaves out none, but must leave out exactly one layer, the readout"),
        ({"blocks": ["none"]}, "blocks= names 'none', which is not in the model"),
        ({"blocks": [nn.Linear(2, 2)]}, "blocks= names a module of type Linear, which is not in the model"),
        ({"head_lr": -1.0}, r"head_lr=-1.0 must be a finite number >= 0"),
        ({"classes": 0}, "classes=0 must be an integer >= 1"),
        ({"seed": -1}, "seed=-1 must be"),
        ({"loss": "none"}, "loss='none' must be one of cross_entropy, similarity, both"),
    ],
)
def test_options_that_make_no_sense_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"LocalLoss: {message}"):
        LocalLoss(cnn(), **options)


@pytest.mark.parametrize(
    ("target", "error", "message"),
    [
        (torch.tensor([5] * 10), ValueError, r"labels 5 to 5, outside 0 to 4, the neurons of .8.; .*classes="),
        (torch.tensor([-1] * 10), ValueError, "labels -1 to -1"),
        (torch.zeros(10), ValueError, r"shape \(10,\) and type torch.float32 must be class labels"),
        (
            torch.zeros(9, dtype=torch.long),
            RuntimeError,
            r"first dimension must be the samples, but there are 9 labels",
        ),
    ],
)
def test_a_target_that_does_not_fit_is_named(target: Tensor, error: type, message: str) -> None:
    model = cnn()
    optimizer, before = LocalLoss(model), weights(model)
    optimizer.target = target
    with pytest.raises(error, match=message):
        model(batch()[0])
    assert same(before, weights(model))


def test_a_missing_target_is_named() -> None:
    model = cnn()
    optimizer, before = LocalLoss(model), weights(model)
    F.cross_entropy(model(batch()[0]), batch()[1]).backward()
    with pytest.raises(RuntimeError, match=r"LocalLoss learns from labels, but .*optimizer\.target = labels before"):
        optimizer.step()
    assert same(before, weights(model))
    with pytest.raises(RuntimeError, match=r"the readout '8' learns from the loss, but no gradient has reached it"):
        optimizer.step(lambda: F.cross_entropy(model(batch()[0]), batch()[1]).item())


def test_a_head_that_cannot_be_sized_is_named() -> None:
    model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU(), nn.Flatten(), nn.LazyLinear(5))
    model(torch.zeros(1, 2, 8, 8))
    optimizer = MonoForward(model)
    optimizer.target = batch()[1]
    model(batch()[0])
    optimizer.target = batch()[1]
    with pytest.raises(RuntimeError, match=r"head of block '0.0' was made for 144 features, but .* now has 196"):
        model(torch.zeros(10, 2, 9, 9))
    model = mlp(dtype=torch.float32)
    optimizer = MonoForward(model)
    optimizer.target = torch.tensor([0])
    with pytest.raises(RuntimeError, match=r"no head can be sized for block '0.0', .* shape \(5,\)"):
        model(torch.zeros(6))


def test_an_order_of_layers_other_than_that_of_registration_is_named() -> None:
    class Reversed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head, self.hidden = nn.Linear(5, 4), nn.Linear(6, 5)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(torch.tanh(self.hidden(x)))

    model, x, y = Reversed(), torch.randn(8, 6), torch.randint(4, (8,))
    optimizer = MonoForward(model)
    optimizer.target = y
    with pytest.raises(RuntimeError, match=r"'hidden' is last in registration order.* enters layer 'head'.*blocks="):
        model(x)
    optimizer.close()
    optimizer = MonoForward(model, blocks=["hidden"])
    optimizer.target = y
    F.cross_entropy(model(x), y).backward()
    optimizer.step()


def test_layers_that_cannot_learn_are_named() -> None:
    class Spikes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.hidden, self.head = nn.Linear(6, 5), nn.Linear(5, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.head((self.hidden(x) > 0).float())

    model, x, y = Spikes(), torch.randn(8, 6), torch.randint(4, (8,))
    optimizer = MonoForward(model)
    for expected in (
        pytest.warns(UserWarning, match="layers ran and learn nothing: 'hidden'"),
        warnings.catch_warnings(),
    ):
        with expected:
            optimizer.target = y
            F.cross_entropy(model(x), y).backward()
            optimizer.step()


# -- a readout of its own ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", [LocalLoss, MonoForward, ForwardForward, LocalPerturbation, LocalContrastive])
def test_a_delta_readout_learns_as_on_a_trunk_that_stays(rule: Any) -> None:
    """As that of a rule whose trunk never changes, in the same ordinary passes; the blocks learn as without it."""
    x, y = batch(n=6)
    kinds = {"delta": rule, "none": rule, "still": bioopt.Homeostasis}
    models, updates = {kind: cnn(dropout=0.0) for kind in kinds}, dict[str, list[Tensor]]()
    for kind, model in models.items():
        options: dict[str, Any] = {"readout": None if kind == "none" else "delta"}
        if kind != "still":
            options |= {"exclude": nn.BatchNorm2d, "seed": 3, **SGD}
        optimizer = kinds[kind](model, 0.0, **options)
        for _ in range(3):
            optimizer.target = y
            optimizer.step(lambda model=model: F.cross_entropy(model(x), y))
        updates[kind] = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    assert same(updates["delta"][:-2], updates["none"][:-2])
    torch.testing.assert_close(updates["delta"][-2:], updates["still"][-2:])
    assert not torch.allclose(updates["delta"][-2], updates["none"][-2], rtol=0.1)


def test_a_delta_readout_counts_the_passes_that_the_blocks_count() -> None:
    """Its running statistics are those of passes that a backward pass has reached."""
    x, y = batch()
    levels = []
    for thrown_away in (False, True):
        model = cnn(dropout=0.0)
        optimizer = MonoForward(model, readout="delta", **SGD)
        optimizer.target = y
        if thrown_away:
            F.cross_entropy(model(-x), y).backward()
            optimizer.zero_grad()
            model(-x)
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        (level,) = optimizer.state_dict()["state"]["rule"]["readout"].values()
        levels.append([level["mean"], level["variance"]])
    torch.testing.assert_close(*levels)


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head, self.hidden, self.stem = nn.Linear(5, 5), nn.Linear(5, 5), nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.hidden(torch.tanh(self.stem(x)))))


def test_a_delta_readout_may_be_registered_first() -> None:
    model, x, y = Tied(), torch.randn(8, 6), torch.randint(5, (8,))
    optimizer = MonoForward(model, readout="delta", readout_layer="head")
    optimizer.target = y
    optimizer.step(lambda: F.cross_entropy(model(x), y))
    assert {name.split("/")[-1] for name in optimizer._owned.modules} == {"hidden", "stem"}
    assert all(p.grad is not None for p in model.parameters())


def test_a_readout_that_cannot_be_one_is_named() -> None:
    tied = Tied()
    tied.hidden.weight = tied.head.weight
    for model, options, message in (
        (cnn(), {"readout": "teacher"}, "readout='teacher' must be one of delta, None"),
        (cnn(), {"readout_lr": 0.1}, "readout_lr, readout_layer and readout_options need a readout"),
        (cnn(), {"readout": "delta", "readout_layer": ["4", "8"]}, "readout_layer= names '4', '8', but it takes one"),
        (
            Tied(),
            {"readout": "delta", "blocks": ["stem", "hidden"]},
            "the readout 'stem' is in block 'stem'; as",
        ),
        (tied, {"readout": "delta", "readout_layer": "head"}, "the readout 'head' shares its weights with layer"),
        (nn.Linear(2, 2), {"readout": "delta"}, "the only plastic layer, '.*', is the readout"),
    ):
        with pytest.raises(ValueError, match=f"LocalLoss: {message}"):
            LocalLoss(model, **options)
    with pytest.raises(ValueError, match="example= is an input of the model, so params must be the model"):
        LocalLoss([cnn(), cnn()], example=batch()[0])


def test_gates_route_samples_with_their_labels() -> None:
    """A pathway that some samples skip ends with the labels of the others."""
    from bioopt.core.rows import on_rows

    class Routed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two, self.head = nn.Linear(6, 5), nn.Linear(5, 5), nn.Linear(5, 4)

        def forward(self, x: Tensor) -> Tensor:
            index = torch.arange(0, len(x), 2)
            with on_rows(index, len(x)):
                part = torch.tanh(self.two(torch.tanh(self.one(x[index]))))
            return self.head(part.new_zeros(len(x), 5).index_copy(0, index, part))

    torch.manual_seed(0)
    model, x, y = Routed(), torch.randn(8, 6), torch.randint(4, (8,))
    optimizer = MonoForward(model, **SGD)
    optimizer.target = y
    optimizer.estimate(lambda: F.cross_entropy(model(x), y))
    head = optimizer._owned["0.one"]
    (expected,) = torch.autograd.grad(F.cross_entropy(head(torch.tanh(model.one(x[::2]))), y[::2]), model.one.weight)
    torch.testing.assert_close(model.one.weight.grad, expected)
    assert isinstance(optimizer, bioopt.OnePass)
