"""The feedback rules: slow twins in double precision, no weight transport, what learned weights learn, bad input."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import bioopt
from bioopt.core.noise import NoiseSource, fill_normal_

from ..rules import batch, cnn, mlp, same, steps, weights
from .twins import NETWORKS, Twin

LAYERWISE = [bioopt.FeedbackAlignment, bioopt.SignSymmetry, bioopt.KolenPollack, bioopt.WeightMirror]
DIRECT = [bioopt.DirectFeedbackAlignment, bioopt.DRTP, bioopt.DirectKolenPollack]
LR = 0.3
SGD: dict[str, Any] = {"descent": torch.optim.SGD, "centre_inputs": False}  # as published
every_network = pytest.mark.parametrize("network", NETWORKS)


def problem(network: str) -> tuple[nn.Sequential, Tensor, Tensor]:
    build, shape = NETWORKS[network]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model, x = build().double(), torch.randn(4, *shape, dtype=torch.float64)
    return model, x, torch.tensor([0, 2, 1, 2])


def learn(optimizer: Any, model: nn.Module, x: Tensor, y: Tensor) -> None:
    optimizer.zero_grad()
    optimizer.target = y
    F.cross_entropy(model(x), y).backward()
    optimizer.step()


def flat(optimizer: Any) -> list[list[float]]:
    """The feedback weights of all layers; none of a first layer that has none."""
    found = [b.flatten().tolist() for b in optimizer.feedback_weights().values()]
    return found if isinstance(optimizer, tuple(LAYERWISE)) else [[], *found]


def agree(twin: Twin, model: nn.Sequential) -> None:
    layers = [layer for layer in model if hasattr(layer, "weight")]
    for layer, w, b in zip(layers, twin.weights, twin.biases, strict=True):
        torch.testing.assert_close(layer.weight.flatten().tolist(), w, rtol=1e-10, atol=1e-12)
        assert (layer.bias is None) == (b is None)
        if b is not None:
            torch.testing.assert_close(layer.bias.tolist(), b, rtol=1e-10, atol=1e-12)


@every_network
@pytest.mark.parametrize("mode", [None, "uniform", "fixed", "batchwise"])
def test_fixed_feedback_is_its_slow_twin(network: str, mode: str | None) -> None:
    model, x, y = problem(network)
    if mode is None:
        optimizer: Any = bioopt.FeedbackAlignment(model, LR, seed=3, feedback_scale=0.7, **SGD)
    else:
        optimizer = bioopt.SignSymmetry(model, LR, mode=mode, seed=3, feedback_scale=0.7, **SGD)
    twin = Twin(model, NETWORKS[network][1], [])
    for _ in range(3):
        twin.feedback = flat(optimizer)
        learn(optimizer, model, x, y)
        twin.step(x, y, LR)
    agree(twin, model)


def test_layers_of_many_inputs_learn_by_shorter_steps() -> None:
    """And so do the feedback weights that learn with them; the last layer and biases do not."""
    x, y = torch.randn(4, 6, dtype=torch.float64), torch.arange(4)
    steps = []
    for fan_in in (None, 7):
        model = mlp(sizes=(6, 8, 14, 5))
        optimizer = bioopt.KolenPollack(model, LR, decay=0.1, fan_in=fan_in, **SGD)
        before = [*weights(model), *flat(optimizer)]
        learn(optimizer, model, x, y)
        after = [*weights(model), *flat(optimizer)]
        steps.append([torch.as_tensor(a) - torch.as_tensor(b) for a, b in zip(after, before, strict=True)])
    shares = [1, 1, 7 / 8, 1, 1, 1, *(1, 7 / 8, 1)]  # of weights and biases, then of feedback weights
    assert all(step.abs().max() > 0 for step in steps[0][:6])
    for share, plain, shorter in zip(shares, *steps, strict=True):
        torch.testing.assert_close(shorter, share * plain)
    with pytest.raises(ValueError, match=r"FeedbackAlignment: fan_in=0 must be a finite number > 0"):
        bioopt.FeedbackAlignment(mlp(), fan_in=0)


@every_network
def test_kolen_pollack_is_its_slow_twin(network: str) -> None:
    model, x, y = problem(network)
    optimizer = bioopt.KolenPollack(model, LR, decay=0.1, seed=3, **SGD)
    twin = Twin(model, NETWORKS[network][1], flat(optimizer))
    for _ in range(3):
        learn(optimizer, model, x, y)
        twin.step(x, y, LR, decay=0.1)
    agree(twin, model)
    torch.testing.assert_close(flat(optimizer)[1:], twin.feedback[1:], rtol=1e-10, atol=1e-12)


@every_network
def test_the_weight_mirror_is_its_slow_twin(network: str) -> None:
    model, x, y = problem(network)
    optimizer = bioopt.WeightMirror(model, LR, mirror_lr=0.2, mirror_decay=0.7, mirror_samples=3, seed=3, **SGD)
    twin = Twin(model, NETWORKS[network][1], flat(optimizer))
    source = NoiseSource()
    for step in range(3):
        noise = []
        for k in range(1, len(twin.maps)):
            shape = (
                twin.shapes[k]
                if len(twin.shapes[k]) == twin.layers[k].weight.ndim - 1
                else twin.layers[k].weight[0].shape
            )
            stream = source.stream(x.device, 3, k, step)
            noise.append(fill_normal_(torch.empty(3, *shape, dtype=torch.float64), stream))
        learn(optimizer, model, x, y)
        before = [*twin.weights]
        old = [*twin.feedback]
        twin.step(x, y, LR)
        after, twin.weights, twin.feedback = twin.weights, before, old
        twin.mirror(noise, 0.2, 0.7)  # by the weights of the pass
        twin.weights = after
    agree(twin, model)
    torch.testing.assert_close(flat(optimizer)[1:], twin.feedback[1:], rtol=1e-10, atol=1e-12)


@every_network
@pytest.mark.parametrize("rule", DIRECT)
@pytest.mark.parametrize("centred", [True, False])
def test_direct_feedback_is_its_slow_twin(network: str, rule: type, centred: bool) -> None:
    model, x, y = problem(network)
    options: dict[str, Any] = {"centred": centred} if rule is bioopt.DRTP else {}
    options |= {"decay": 0.1} if rule is bioopt.DirectKolenPollack else {}
    optimizer: Any = rule(model, LR, seed=3, orthogonal=False, **options, **SGD)
    before = weights(model)
    optimizer.target = y
    F.cross_entropy(model(x), y).backward()  # shows the shapes
    optimizer.discard()
    assert same(before, weights(model))
    twin = Twin(model, NETWORKS[network][1], flat(optimizer))
    for _ in range(3):
        learn(optimizer, model, x, y)
        twin.step(x, y, LR, direct=True, target=rule is bioopt.DRTP, centred=centred, decay=options.get("decay"))
    agree(twin, model)
    torch.testing.assert_close(flat(optimizer)[1:], twin.feedback[1:], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("rule", [r for r in (*LAYERWISE, *DIRECT, None) if r is not bioopt.SignSymmetry])
def test_no_weight_is_transported(rule: Callable[..., Any] | None) -> None:
    """Weights downstream change where this changes no activity and no error: an update below must not notice."""
    changes = []
    x = torch.randn(4, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    y = torch.arange(4)
    for turned in (False, True):
        model = mlp(sizes=(6, 8, 7, 5))
        optimizer = torch.optim.SGD(model.parameters(), LR) if rule is None else rule(model, LR, **SGD)
        for step in range(2):
            before = weights(model)
            if turned and step:
                with torch.no_grad():
                    h = model[1](model[0](x))  # 4 patterns of 8 neurons: there are directions without activity
                    away = torch.linalg.svd(h)[2][-1]
                    assert (h @ away).abs().max() < 1e-12
                    model[2].weight += 3 * torch.ones(7, 1).double() * away
            learn(optimizer, model, x, y)
        changes.append(model[0].weight.detach() - before[0])
    difference = (changes[0] - changes[1]).norm() / changes[0].norm()
    assert difference > 0.5 if rule is None else difference < 1e-10


def test_signs_follow_the_weights() -> None:
    for mode in ("uniform", "fixed", "batchwise"):
        model = cnn()
        optimizer = bioopt.SignSymmetry(model, 0.05, mode=mode)
        first = optimizer.feedback_weights()
        with torch.no_grad():
            model[4].weight.neg_()
            model[8].weight[0] = 0
        second = optimizer.feedback_weights()
        torch.testing.assert_close(second["4"], -first["4"])
        assert not second["8"][0].any()
        assert torch.equal(second["8"][1:], first["8"][1:])
        steps(optimizer, model, 1)
        with torch.no_grad():
            model[8].weight.fill_(1.0)
        changed = optimizer.feedback_weights()["8"].abs()
        assert torch.equal(changed[1:], first["8"][1:].abs()) == (mode != "batchwise")
        size = changed.square().mean().sqrt() * 32**0.5
        assert abs(size - 1) < 1e-6 if mode == "uniform" else 0.8 < size < 1.2


def test_the_error_keeps_its_length_on_average() -> None:
    model = nn.Sequential(nn.Conv2d(3, 40, 3, padding=1, padding_mode="circular"), nn.Conv2d(40, 50, 3), nn.Flatten(),
                          nn.Linear(50 * 16, 300))  # fmt: skip
    x, y = torch.randn(4, 3, 6, 6), torch.randn(4, 300)
    for rule in (bioopt.FeedbackAlignment, bioopt.DirectFeedbackAlignment):
        optimizer = rule(model)
        seen: list[Tensor] = []

        def look(layer: nn.Module, args: Any, u: Tensor, seen: list[Tensor] = seen) -> None:
            u.register_hook(lambda g: seen.append(g.norm()))

        handles = [layer.register_forward_hook(look) for layer in model[:2]]
        ((model(x) - y) / 2).square().sum().backward()
        error = ((model(x) - y) / 2).norm()
        assert all(0.8 < size / error < 1.25 for size in seen), rule
        for handle in handles:
            handle.remove()
        optimizer.close()


def test_forward_and_feedback_weights_of_kolen_pollack_become_equal() -> None:
    model, x, y = problem("convolutions")
    optimizer = bioopt.KolenPollack(model, 0.1, decay=0.5, **SGD)
    gap = model[2].weight.detach() - optimizer.feedback_weights()["2"]
    for _ in range(20):
        learn(optimizer, model, x, y)
    left = model[2].weight.detach() - optimizer.feedback_weights()["2"]
    torch.testing.assert_close(left, gap * (1 - 0.1 * 0.5) ** 20, rtol=1e-9, atol=1e-12)


def test_mirrored_weights_become_the_forward_weights() -> None:
    model, x, y = problem("convolutions")
    optimizer = bioopt.WeightMirror(model, 0.0, mirror_lr=0.05, mirror_samples=64, **SGD)
    random = torch.get_rng_state()
    for _ in range(150):
        learn(optimizer, model, x, y)
    assert torch.equal(random, torch.get_rng_state())
    for name, layer in (("2", model[2]), ("5", model[5])):
        found = optimizer.feedback_weights()[name]
        assert F.cosine_similarity(found.flatten(), layer.weight.flatten(), 0) > 0.95
        assert 0.8 < found.norm() / layer.weight.norm() < 1.2


@pytest.mark.parametrize("rule", [bioopt.FeedbackAlignment, bioopt.KolenPollack, bioopt.DirectFeedbackAlignment])
def test_all_that_is_drawn_comes_from_the_seed(rule: type) -> None:
    found = []
    for seed, state in ((3, 0), (3, 1), (4, 0)):
        torch.manual_seed(state)
        model = cnn(dropout=0.0)
        if state:  # nor does the memory format matter
            model = model.to(memory_format=torch.channels_last)
        before = torch.get_rng_state()
        optimizer: Any = rule(model, lr=0.0, seed=seed)
        learn(optimizer, model, *batch())
        assert torch.equal(before, torch.get_rng_state())
        found.append(optimizer.feedback_weights())
    assert all(torch.equal(found[0][name], found[1][name]) for name in ("4", "8"))
    assert not any(torch.equal(found[0][name], found[2][name]) for name in ("4", "8"))


def test_a_loaded_state_brings_its_seed() -> None:
    one, other = cnn(), cnn()
    first, second = bioopt.FeedbackAlignment(one, seed=1), bioopt.FeedbackAlignment(other, seed=2)
    second.load_state_dict(first.state_dict())
    assert torch.equal(first.feedback_weights()["4"], second.feedback_weights()["4"])


def test_what_returned_is_a_copy() -> None:
    model = cnn()
    optimizer = bioopt.FeedbackAlignment(model)
    optimizer.feedback_weights()["4"].zero_()
    assert optimizer.feedback_weights()["4"].any()


def test_learned_feedback_has_the_options_of_its_layer() -> None:
    model = cnn()
    groups = [{"params": model[:4], "lr": 0.1, "decay": 0.5}, {"params": model[4:], "weight_decay": 0.2}]
    optimizer = bioopt.KolenPollack(groups, 0.01)
    first, second, *own = optimizer.param_groups
    for group, feedback in zip((first, second), own, strict=True):
        assert {k: v for k, v in group.items() if k not in ("params", "param_names")} == {
            k: v for k, v in feedback.items() if k not in ("params", "param_names")
        }
    assert [p.shape for p in own[1]["params"]] == [model[4].weight.shape, model[8].weight.shape]


class Tokens(nn.Module):
    def __init__(self, tokenwise: bool) -> None:
        super().__init__()
        self.one, self.two, self.readout = nn.Linear(5, 6), nn.Linear(6, 6), nn.Linear(6, 4)
        self.tokenwise = tokenwise

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.two(torch.tanh(self.one(x))))
        return self.readout(h if self.tokenwise else h.mean(1))


@pytest.mark.parametrize("rule", DIRECT)
@pytest.mark.parametrize("tokenwise", [True, False])
def test_direct_feedback_of_sequences(rule: type, tokenwise: bool) -> None:
    model, x = Tokens(tokenwise), torch.randn(3, 7, 5)
    optimizer: Any = rule(model, LR, **SGD)
    before = weights(model)
    y = torch.randint(4, (3, 7) if tokenwise else (3,))
    optimizer.target = y
    F.cross_entropy(model(x).flatten(0, -2), y.flatten()).backward()
    optimizer.step()
    assert not any(torch.equal(p, q) for p, q in zip(before, weights(model), strict=True))
    shape = (4, 6) if tokenwise else (4, 7, 6)
    assert optimizer.feedback_weights()["two"].shape == shape
    if not tokenwise:
        with pytest.raises(RuntimeError, match=r"input of layer 'two' has the shape \(3, 2, 6\).*inputs of one size"):
            learn(optimizer, model, x[:, :2], y)


def test_the_target_of_each_forward_pass_counts() -> None:
    """Accumulation: two passes before their backward passes, each with its own labels."""
    results = []
    for together in (True, False):
        model = cnn(dropout=0.0)
        model[1].eval()
        optimizer = bioopt.DRTP(model, 0.1, **SGD)
        halves = [batch(0, 5), batch(1, 5)]
        losses = []
        for x, y in halves:
            optimizer.target = y
            losses.append(F.cross_entropy(model(x), y))
            if not together:
                losses[-1].backward()
        if together:
            torch.stack(losses).sum().backward()
        optimizer.step()
        assert optimizer.target is None
        results.append(weights(model))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


def test_bad_input_is_named() -> None:
    _x, _y = batch()
    for rule in (*LAYERWISE, *DIRECT):
        name = rule.__name__
        for scale in (0, -1, float("nan"), "large"):
            with pytest.raises(ValueError, match=f"{name}: feedback_scale=.* must be a finite number > 0"):
                rule(cnn(), feedback_scale=scale)
        with pytest.raises(ValueError, match=f"{name}: seed=-1 must be"):
            rule(cnn(), seed=-1)
        with pytest.raises(ValueError, match=f"{name}: the model has no plastic layer"):
            rule(nn.Sequential(nn.Flatten(), nn.ReLU()))
        with pytest.raises(TypeError, match=f"{name} .*needs the model"):
            rule(cnn().parameters())
    with pytest.raises(ValueError, match="SignSymmetry: mode='strict' must be one of uniform, fixed, batchwise"):
        bioopt.SignSymmetry(cnn(), mode="strict")
    with pytest.raises(ValueError, match="WeightMirror: mirror_samples=0 must be"):
        bioopt.WeightMirror(cnn(), mirror_samples=0)
    with pytest.raises(
        RuntimeError, match=r"DirectFeedbackAlignment: direct feedback has the shapes of activity.*first"
    ):
        bioopt.DirectFeedbackAlignment(cnn()).feedback_weights()
    with pytest.raises(
        ValueError, match=r"DRTP: readout_layer='fc' is not a layer that the rule trains; it trains 0, 4, 8"
    ):
        bioopt.DRTP(cnn(), readout_layer="fc")
    with pytest.raises(ValueError, match="DRTP: centred=2 must be True or False"):
        bioopt.DRTP(cnn(), centred=2)  # type: ignore[arg-type]


def test_a_target_that_does_not_fit_is_named() -> None:
    model, (x, y) = cnn(), batch()
    optimizer, before = bioopt.DRTP(model), weights(model)
    with pytest.raises(RuntimeError, match=r"DRTP was given no target for this forward pass: set optimizer\.target"):
        F.cross_entropy(model(x), y).backward()
    for target, message in ((y[:3], r"target of shape \(3,\) and type torch.int64 must be class labels"),
                            (y.float(), "must be class labels"), (y + 3, "outside 0 to 4")):  # fmt: skip
        optimizer.discard()
        optimizer.target = target
        with pytest.raises(ValueError, match=f"DRTP: .*{message}"):
            F.cross_entropy(model(x), y).backward()
    single = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 1))
    for centred in (True, False):
        rule = bioopt.DRTP(single, centred=centred)
        rule.target = torch.ones(2, 1)
        loss = single(torch.randn(2, 4)).square().mean()
        if centred:
            with pytest.raises(ValueError, match=r"DRTP: the readout '2' has one output.*centred=False"):
                loss.backward()
        else:
            loss.backward()
        rule.close()
    assert same(before, weights(model))


class Heads(nn.Module):
    """The readout is registered, and fires, before another head."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk, self.readout, self.aside = nn.Linear(4, 5), nn.Linear(5, 3), nn.Linear(5, 2)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = torch.tanh(self.trunk(x))
        return self.readout(h), self.aside(h)


def test_the_readout_can_be_named() -> None:
    x, y = torch.randn(6, 4), torch.randint(3, (6,))
    model = Heads()
    optimizer = bioopt.DirectFeedbackAlignment(model)
    with pytest.raises(
        RuntimeError, match=r"reached layer 'readout' before the readout 'aside': .*readout_layer='\.\.\.'"
    ):
        F.cross_entropy(model(x)[0], y).backward()
    optimizer.close()
    for named in ("readout", model.readout):
        optimizer = bioopt.DirectFeedbackAlignment(model, readout_layer=named)
        F.cross_entropy(model(x)[0], y).backward()
        optimizer.step()
        assert optimizer.feedback_weights()["readout"].shape == (3, 5)
        optimizer.close()


@pytest.mark.parametrize("rule", [bioopt.KolenPollack, bioopt.DirectFeedbackAlignment])
def test_a_replaced_layer_is_named(rule: type) -> None:
    model = cnn(dropout=0.0)
    optimizer: Any = rule(model)
    learn(optimizer, model, *batch())
    model[4] = nn.Conv2d(6, 8, 3, bias=False)
    with pytest.warns(UserWarning, match=r"'4' \(it was replaced in the model after the optimizer was built"):
        learn(optimizer, model, *batch())
    model = cnn(dropout=0.0)
    optimizer = rule(model)
    model[4].weight = nn.Parameter(torch.randn(8, 6, 3, 3))
    with pytest.raises(RuntimeError, match=f"{rule.__name__}: parameter '4.weight' was replaced"):
        learn(optimizer, model, *batch())


@pytest.mark.parametrize("rule", [bioopt.KolenPollack, bioopt.DirectKolenPollack])
def test_layers_that_share_their_weights_decay_once(rule: type) -> None:
    model = mlp(sizes=(6, 5, 5, 5, 4))
    model[4].weight = model[2].weight
    x, y = torch.randn(4, 6, dtype=torch.float64), torch.arange(4)
    optimizer: Any = rule(model, 0.1, decay=0.0, **SGD)
    assert len(optimizer.layers()) == 4
    optimizer.target = y
    F.cross_entropy(model(x), y).backward()
    optimizer.estimate()
    plain = model[2].weight.grad.clone()
    for group in optimizer.param_groups:
        group["decay"] = 0.5
    F.cross_entropy(model(x), y)
    optimizer.zero_grad()
    F.cross_entropy(model(x), y).backward()
    optimizer.estimate()
    torch.testing.assert_close(model[2].weight.grad, plain + 0.5 * model[2].weight)


def test_orthogonal_updates_keep_directions_and_level_their_strengths() -> None:
    model, x, y = problem("convolutions")
    plain = bioopt.FeedbackAlignment(model, LR, **SGD)
    F.cross_entropy(model(x), y).backward()
    plain.estimate()
    wanted = {name: p.grad.clone() for name, p in model.named_parameters()}
    plain.close()
    optimizer = bioopt.KolenPollack(model, LR, decay=0.0, orthogonal=True, **SGD)
    optimizer.zero_grad()
    F.cross_entropy(model(x), y).backward()
    optimizer.estimate()
    for name, layer, pools in (("0", model[0], 2), ("2", model[2], 1), ("5", model[5], 1)):
        for got, raw in zip(
            layer.weight.grad.flatten(1).chunk(pools), wanted[f"{name}.weight"].flatten(1).chunk(pools), strict=True
        ):
            u, s, v = torch.linalg.svd(raw, full_matrices=False)
            strengths = torch.diagonal(u.T @ got @ v.T)
            strong = s > 0.05 * s.max()
            assert ((strengths > 0.6) & (strengths < 1.3))[strong].all(), name
            torch.testing.assert_close(u @ torch.diag(strengths) @ v, got, rtol=1e-6, atol=1e-6)
        if layer.bias is not None:
            torch.testing.assert_close(layer.bias.grad, wanted[f"{name}.bias"])
    first, second = optimizer.param_groups[-1]["params"][1:]
    assert torch.equal(first.grad, model[2].weight.grad)  # feedback weights learn the same
    assert torch.equal(second.grad, model[5].weight.grad)
    with pytest.raises(ValueError, match="KolenPollack: orthogonal='yes' must be True or False"):
        bioopt.KolenPollack(model, orthogonal="yes")  # type: ignore[typeddict-item]


@pytest.mark.parametrize("rule", DIRECT)
def test_the_memory_format_changes_nothing_but_the_memory(rule: type) -> None:
    results = []
    for memory_format in (torch.contiguous_format, torch.channels_last):
        model = cnn(dropout=0.0).double().to(memory_format=memory_format)
        optimizer: Any = rule(model, 0.1, **SGD)
        for i in range(2):
            x, y = batch(i)
            learn(optimizer, model, x.double().to(memory_format=memory_format), y)
        results.append([*weights(model), *optimizer.feedback_weights().values()])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_learned_direct_feedback_of_the_last_layer_meets_its_weights_with_orthogonal_updates_too() -> None:
    model = mlp(sizes=(6, 8, 5))
    x, y = torch.randn(4, 6, dtype=torch.float64), torch.arange(4)
    optimizer = bioopt.DirectKolenPollack(model, LR, decay=0.5, **SGD)
    learn(optimizer, model, x, y)
    name, layer = [*optimizer.layers().items()][-1]
    apart = layer.weight.detach() - optimizer.feedback_weights()[name]
    learn(optimizer, model, x, y)
    torch.testing.assert_close(layer.weight.detach() - optimizer.feedback_weights()[name], apart * (1 - LR * 0.5))


@pytest.mark.parametrize("rule", DIRECT)
@pytest.mark.parametrize("samples", [5, 1, 0])
def test_a_pathway_gets_the_error_of_its_own_samples(rule: type, samples: int) -> None:
    torch.manual_seed(0)
    paths = [nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 7)) for _ in range(2)]
    model = nn.Sequential(bioopt.nn.Gate(nn.Linear(6, 2), paths, active=1), nn.Linear(7, 4)).double()
    optimizer: Any = rule(model, LR, **SGD)
    x, y = torch.randn(samples, 6, dtype=torch.float64), torch.arange(samples) % 4
    middle: list[Tensor] = []

    def keep(layer: nn.Module, args: Any, h: Tensor) -> None:
        h.retain_grad()
        middle.append(h)

    for path in paths:
        path[1].register_forward_hook(keep)
    optimizer.target = y
    output = model(x)
    (F.cross_entropy(output, y, reduction="sum") / max(samples, 1)).backward()
    shown = F.one_hot(y, 4).double() - (0.25 if rule is bioopt.DRTP else output.detach().softmax(-1))
    error = -shown / max(samples, 1)
    for i, h in enumerate(middle):
        rows = model[0].gates[:, i].nonzero().flatten()
        assert len(h) == len(rows)
        back = optimizer.feedback_weights()[f"0.pathways.{i}.2"]
        torch.testing.assert_close(h.grad, error[rows] @ back)
        if rule is bioopt.DirectKolenPollack:
            own = next(s for s in optimizer.layers().values() if s.layer is paths[i][2])
            torch.testing.assert_close(optimizer.own_weights(own).grad, error[rows].T @ h.detach())
    optimizer.step()
    assert all(p.isfinite().all() for p in model.parameters())


def test_a_readout_that_some_samples_skip_is_refused() -> None:
    paths = [nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4)) for _ in range(2)]
    model = nn.Sequential(nn.Linear(6, 6), bioopt.nn.Gate(nn.Linear(6, 2), paths, active=1))
    optimizer = bioopt.DirectFeedbackAlignment(model)
    with pytest.raises(RuntimeError, match=r"'1.pathways.0.2' and the readout '1.pathways.1.2' ran on different sampl"):
        optimizer.step(lambda: F.cross_entropy(model(torch.randn(5, 6)), torch.arange(5) % 4))


def test_mirrored_weights_of_a_checkpoint_go_where_the_model_is() -> None:
    model, x, y = problem("convolutions")
    optimizer = bioopt.WeightMirror(model)
    learn(optimizer, model, x, y)
    moved = problem("convolutions")[0].to("meta")
    other = bioopt.WeightMirror(moved)
    other.load_state_dict(optimizer.state_dict())
    assert {weights.device.type for weights in other.feedback_weights().values()} == {"meta"}
