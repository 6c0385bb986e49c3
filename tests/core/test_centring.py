"""Steps on centred presynaptic activity: exact, local to a neuron, and without the common mode of all inputs."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import SGD, Adam

import bioopt
from bioopt.core.homeostasis import RATE

Make = Callable[..., Any]


class Backpropagation(bioopt.FeedbackRule):
    """The gradient itself, so that what is tested is the step."""

    def feedback(self, synapse: bioopt.Synapse, g: Tensor, x_shape: torch.Size) -> Tensor:
        """The error, by the forward weights."""
        return synapse.transpose(synapse.weight, g, x_shape)


def network() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(
        *(nn.Conv2d(4, 6, 3, padding=1, groups=2), nn.ReLU(), nn.AvgPool2d(2), nn.Flatten()),
        *(nn.Linear(24, 5), nn.Sigmoid(), nn.Linear(5, 3)),
    )
    return model.double()


def batch(seed: int = 0, samples: int = 6) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(samples, 4, 4, 4, generator=generator, dtype=torch.float64) + 1
    return x, torch.randint(3, (samples,), generator=generator)


def step(model: nn.Module, optimizer: Any, x: Tensor, y: Tensor) -> float:
    optimizer.zero_grad()
    optimizer.target = y
    loss = F.cross_entropy(model(x), y)
    loss.backward()
    optimizer.step()
    return loss.item()


def layers(model: nn.Module) -> list[Any]:
    return [layer for layer in model.modules() if isinstance(layer, nn.Linear | nn.Conv2d)]


def inputs_of(model: nn.Module, x: Tensor) -> list[Tensor]:
    """Presynaptic activity of each layer."""
    found: list[Tensor] = []
    hooks = [layer.register_forward_hook(lambda _, args, __: found.append(args[0])) for layer in layers(model)]
    model(x)
    for hook in hooks:
        hook.remove()
    return found


def spread(mean: Tensor, layer: Any) -> Tensor:
    """A mean per input channel, in the form of the weight."""
    if isinstance(layer, nn.Linear):
        return mean.expand_as(layer.weight)
    pools = mean.view(layer.groups, 1, -1).expand(-1, len(layer.weight) // layer.groups, -1)
    return pools.reshape(len(layer.weight), -1, 1, 1).expand_as(layer.weight)


def whitened(grad: Tensor, covariances: list[Tensor], strength: float) -> Tensor:
    """A gradient of a convolution by weights that learn from inputs which inhibit each other."""
    parts = []
    for rows, covariance in zip(grad.chunk(len(covariances)), covariances, strict=True):
        inhibition = strength * len(covariance) / covariance.trace() * covariance
        parts += [
            torch.linalg.solve(torch.eye(len(covariance), dtype=grad.dtype) + inhibition, row.flatten()) for row in rows
        ]
    return torch.stack(parts).view_as(grad)


@pytest.mark.parametrize("strength", [0.0, 2.0])
@pytest.mark.parametrize("descent", [SGD, Adam])
def test_equals_a_plain_descent_along_weights_and_activity_at_the_mean_input(
    descent: Any, strength: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bioopt.core.whitening.LEAST_EVENTS", 1000)  # all that there are
    model, plain = network(), network()
    optimizer = Backpropagation(model, lr=0.1, descent=descent, whitening=strength)
    means: list[Tensor] = []
    covariances: list[Tensor] = []  # of the inputs of the convolution, in each of its groups
    at_work: list[Tensor] = []  # those of steps 1, 2 and 4
    slow: Any = None
    for number in range(5):
        x, y = batch(number)
        step(model, optimizer, x, y)

        inputs = inputs_of(plain, x)
        grads = torch.autograd.grad(F.cross_entropy(plain(x), y), list(plain.parameters()))
        now = [x.detach().mean([0, *range(2, x.ndim)]) for x in inputs]
        rate = max(RATE, 1 / (1 + number))
        conv = layers(plain)[0]
        rows = F.unfold(x, 3, padding=1).movedim(1, -1).reshape(-1, 2, 18).movedim(1, 0)
        off = rows - (rows.mean(1, keepdim=True) if number == 0 else spread(means[0], conv)[::3].reshape(2, 1, 18))
        fresh = [r.T @ r / len(r) for r in off]
        covariances = [torch.lerp(a, b, rate) for a, b in zip(covariances or fresh, fresh, strict=True)]
        at_work = covariances if number + 1 in (1, 2, 4) else at_work
        means = [new if number == 0 else torch.lerp(old, new, rate) for old, new in zip(means or now, now, strict=True)]
        # The layer as W (x - mean) + c: W and c are what descends.
        at_mean = [
            (spread(mean, layer) * layer.weight).flatten(1).sum(1).detach()
            for mean, layer in zip(means, layers(plain), strict=True)
        ]
        points = [p.detach().clone().requires_grad_() for p in plain.parameters()]
        if slow is None:
            slow = descent(points, lr=0.1)
        else:
            for group_p, p in zip(slow.param_groups[0]["params"], points, strict=True):
                group_p.data.copy_(p)
        points = slow.param_groups[0]["params"]
        with torch.no_grad():
            for i, (mean, layer) in enumerate(zip(means, layers(plain), strict=True)):
                weight, bias = points[2 * i], points[2 * i + 1]
                bias.add_(at_mean[i])
                weight.grad = grads[2 * i] - grads[2 * i + 1].view(-1, *[1] * (weight.ndim - 1)) * spread(mean, layer)
                if strength and layer is conv:
                    weight.grad = whitened(weight.grad, at_work, strength)
                bias.grad = grads[2 * i + 1]
            slow.step()
            for i, (mean, layer) in enumerate(zip(means, layers(plain), strict=True)):
                layer.weight.copy_(points[2 * i])
                layer.bias.copy_(points[2 * i + 1] - (spread(mean, layer) * points[2 * i]).flatten(1).sum(1))
        torch.testing.assert_close(list(model.parameters()), list(plain.parameters()), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("make", [Backpropagation, bioopt.FeedbackAlignment, bioopt.LocalLoss])
def test_a_constant_added_to_the_input_changes_nothing_that_is_learned(make: Make) -> None:
    """The first bias makes up for it at the start, and goes on to do so."""
    losses = []
    for offset in (0.0, 3.0):
        model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)).double()
        torch.manual_seed(1)
        for p in model.parameters():
            nn.init.normal_(p, 0, 0.5)
        with torch.no_grad():
            model[0].bias -= offset * model[0].weight.sum(1)  # type: ignore[operator, union-attr]
        optimizer = make(model, lr=0.05)
        generator = torch.Generator().manual_seed(0)
        x = torch.rand(20, 6, generator=generator, dtype=torch.float64) + offset
        y = torch.randint(3, (20,), generator=generator)
        losses.append([step(model, optimizer, x, y) for _ in range(10)])
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-6, atol=1e-8)
    assert losses[0][-1] < losses[0][0]


def test_a_step_of_length_zero_changes_no_bit() -> None:
    model = network()
    before = copy.deepcopy(model.state_dict())
    optimizer = Backpropagation(model, lr=0.0)
    step(model, optimizer, *batch())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_the_estimate_stays_the_gradient_before_and_after_the_step() -> None:
    model = network()
    optimizer = Backpropagation(model, lr=0.1)
    x, y = batch()
    grads = torch.autograd.grad(F.cross_entropy(model(x), y), list(model.parameters()))
    step(model, optimizer, x, y)
    torch.testing.assert_close([p.grad for p in model.parameters()], list(grads))


def test_single_samples_teach_weights_too() -> None:
    """A batch of one equals its own mean, but not the running mean."""
    model = network()
    before = model[4].weight.detach().clone()  # type: ignore[union-attr, operator]
    optimizer = Backpropagation(model, lr=0.1)
    step(model, optimizer, *batch(0, 1))
    step(model, optimizer, *batch(1, 1))
    assert (model[4].weight - before).abs().max() > 1e-4  # type: ignore[union-attr, operator]


def test_layers_without_a_bias_that_learns_take_plain_steps() -> None:
    found = []
    for centre in (True, False):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 5, bias=False), nn.ReLU(), nn.Linear(5, 3)).double()
        model[2].bias.requires_grad_(False)  # type: ignore[union-attr]
        optimizer = Backpropagation(model, lr=0.1, centre_inputs=centre)
        for number in range(3):
            x = torch.rand(7, 6, generator=torch.Generator().manual_seed(number), dtype=torch.float64)
            step(model, optimizer, x, torch.arange(7) % 3)
        found.append(model.state_dict())
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


def test_resumes_bit_for_bit() -> None:
    model = network()
    optimizer = Backpropagation(model, lr=0.1, descent=Adam)
    for number in range(3):
        step(model, optimizer, *batch(number))
    twin = copy.deepcopy(model)
    other = Backpropagation(twin, lr=0.1, descent=Adam)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for number in range(3, 6):
        step(model, optimizer, *batch(number))
        step(twin, other, *batch(number))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), twin.parameters(), strict=True))


def test_only_passes_that_teach_are_counted() -> None:
    model = network()
    optimizer = Backpropagation(model, lr=0.1)
    x, y = batch()
    model.eval()
    model(x + 100)
    model.train()
    model(x + 100)
    optimizer.discard()
    step(model, optimizer, x, y)
    levels = optimizer.state_dict()["state"]["rule"]["presynaptic"]
    torch.testing.assert_close(levels[0]["mean"], x.mean((0, 2, 3)))


def test_kolen_pollack_keeps_the_difference_of_both_weights() -> None:
    """Both take the same step, and the decay alone brings them together."""
    model = network()
    optimizer = bioopt.KolenPollack(model, lr=0.1, decay=0.05, descent=SGD)
    names = ["4", "6"]
    before = {name: optimizer.layers()[name].weight - optimizer.feedback_weights()[name] for name in names}
    step(model, optimizer, *batch())
    for name in names:
        now = optimizer.layers()[name].weight - optimizer.feedback_weights()[name]
        torch.testing.assert_close(now, before[name] * (1 - 0.1 * 0.05))


def test_orthogonal_updates_are_not_centred() -> None:
    model = network()
    for option in ({"centre_inputs": True}, {"whitening": 0.5}):
        (named,) = (f"{name}={value!r}" for name, value in option.items())
        with pytest.raises(
            ValueError, match=rf"FeedbackAlignment: {named} needs orthogonal=False, since .* replace the gradient"
        ):
            bioopt.FeedbackAlignment(model, orthogonal=True, **option)
        with pytest.raises(TypeError, match=rf"WeightPerturbation: {named} is for rules whose layers descend"):
            bioopt.WeightPerturbation(model, **option)
    optimizer = bioopt.FeedbackAlignment(model, orthogonal=True, centre_inputs=None)
    step(model, optimizer, *batch())
    assert "presynaptic" not in optimizer.state_dict()["state"]["rule"]


def test_which_rules_centre_by_default() -> None:
    def centred(optimizer: bioopt.LearningRule) -> bool:
        optimizer.close()
        return optimizer._centring is not None

    model = network()
    assert centred(bioopt.NodePerturbation(model))
    assert not centred(bioopt.NodePerturbation(model, 0.1, relative=False))
    assert not centred(bioopt.RankOnePerturbation(model))
    assert centred(bioopt.PredictiveCoding(model))
    assert not centred(bioopt.PredictiveCoding(model, mu_pc=True))
    assert centred(bioopt.EProp(model))
    assert not centred(bioopt.Hebbian(model))
    with pytest.raises(ValueError, match=r"centre_inputs=True needs mu_pc=False, since .* units of their own"):
        bioopt.PredictiveCoding(model, mu_pc=True, centre_inputs=True)
    for rule in (bioopt.Hebbian, bioopt.WeightPerturbation, bioopt.RankOnePerturbation):
        with pytest.raises(TypeError, match=rf"{rule.__name__}: centre_inputs=True is for rules whose layers descend"):
            rule(model, centre_inputs=True)


def test_refuses_what_is_neither_true_nor_false() -> None:
    with pytest.raises(ValueError, match=r"FeedbackAlignment: centre_inputs='yes' must be True or False"):
        bioopt.FeedbackAlignment(network(), centre_inputs="yes")  # type: ignore[arg-type]


def test_learned_direct_feedback_is_centred_like_the_weights() -> None:
    """A common mode of positive activity in feedback and weights would drive each other."""
    model = network()
    optimizer = bioopt.DirectKolenPollack(model, lr=0.1, decay=0.05, orthogonal=False, descent=SGD)
    step(model, optimizer, *batch())
    before = {name: w.clone() for name, w in optimizer.feedback_weights().items()}
    last = optimizer.layers()["6"].weight.detach() - before["6"]
    mean = optimizer.state_dict()["state"]["rule"]["presynaptic"][1]["mean"]
    x, y = batch(1)
    error = torch.autograd.grad(F.cross_entropy(out := model(x), y), out)[0]
    hidden = inputs_of(model, x)[1].detach()
    step(model, optimizer, x, y)
    expected = before["4"] - 0.1 * (error.T @ (hidden - mean) + 0.05 * before["4"])
    torch.testing.assert_close(optimizer.feedback_weights()["4"], expected)
    now = optimizer.layers()["6"].weight.detach() - optimizer.feedback_weights()["6"]
    torch.testing.assert_close(now, last * (1 - 0.1 * 0.05))  # as in Kolen-Pollack


def levels(optimizer: Any) -> list[dict[str, Any]]:
    """The running values of presynaptic activity of all layers."""
    return list(optimizer.state_dict()["state"]["rule"]["presynaptic"].values())


@pytest.mark.parametrize("way", ["skipped", "skipped after backward", "refused"])
@pytest.mark.parametrize("make", [Backpropagation, bioopt.LocalLoss])
def test_a_batch_that_teaches_nothing_leaves_no_trace(make: Make, way: str) -> None:
    """Skipped by the loop, or with a number that is not finite."""
    kept, disturbed = network(), network()
    one, other = make(kept, lr=0.1), make(disturbed, lr=0.1)
    for seed in range(3):
        step(kept, one, *batch(seed))
        step(disturbed, other, *batch(seed))
        if way == "refused":
            x, y = batch(seed + 10)
            with pytest.raises(bioopt.Diverged):
                step(disturbed, other, x.masked_fill(x == x.max(), float("nan")), y)
            continue
        other.zero_grad()
        x, y = batch(seed + 10)
        other.target = y
        loss = F.cross_entropy(disturbed(x), y)
        if way == "skipped after backward":
            loss.backward()
    step(kept, one, *batch(3))
    step(disturbed, other, *batch(3))
    for p, q in zip(kept.parameters(), disturbed.parameters(), strict=True):
        assert torch.equal(p, q)


def test_gradients_may_be_cleared_after_the_forward_pass() -> None:
    usual, late = network(), network()
    one, other = Backpropagation(usual, lr=0.1), Backpropagation(late, lr=0.1)
    for seed in range(3):
        step(usual, one, *batch(seed))
        loss = F.cross_entropy(late(batch(seed)[0]), batch(seed)[1])
        other.zero_grad()
        loss.backward()
        other.step()
    for p, q in zip(usual.parameters(), late.parameters(), strict=True):
        assert torch.equal(p, q)


def test_a_diagnosis_between_a_pass_and_its_step_changes_nothing() -> None:
    plain, diagnosed = network(), network()
    one, other = Backpropagation(plain, lr=0.1), Backpropagation(diagnosed, lr=0.1)
    x, y = batch(5)
    for seed in range(2):
        step(plain, one, *batch(seed))
        step(diagnosed, other, *batch(seed))
        bioopt.diagnose(other, lambda: F.cross_entropy(diagnosed(x), y))
    for p, q in zip(plain.parameters(), diagnosed.parameters(), strict=True):
        assert torch.equal(p, q)


def test_a_pathway_without_samples_keeps_its_running_values() -> None:
    torch.manual_seed(0)
    model = nn.ModuleList([nn.Linear(4, 5), nn.Linear(4, 5), nn.Linear(5, 3)]).double()
    optimizer = Backpropagation(model, lr=1e-3)
    x, y = batch(samples=16)
    x = x.flatten(1)[:, :4] + 5

    def closure(first: int) -> Callable[[], Tensor]:
        def run() -> Tensor:
            hidden = torch.cat([model[0](x[:first]), model[1](x[first:])])
            return F.cross_entropy(model[2](torch.tanh(hidden)), y, reduction="none")

        return run

    optimizer.step(closure(8))
    before = copy.deepcopy(levels(optimizer))
    optimizer.step(closure(0))
    after = levels(optimizer)
    assert torch.equal(before[0]["mean"], after[0]["mean"])
    assert before[0]["steps"] == after[0]["steps"] == 1
    assert after[1]["steps"] == 2
    assert not torch.equal(before[1]["mean"], after[1]["mean"])
