"""Which firings a rule with a readout learns from: those whose loss was sent backward, each once."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import bioopt

from ..rules import LOCAL, Case, batch, mlp, published, same, spiking_mlp, weights

X, Y = torch.randn(8, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0)), torch.arange(8) % 4
one_pass = pytest.mark.parametrize("case", LOCAL, ids=str)


def after(
    play: Callable[[nn.Module, bioopt.LocalRule], None],
    network: Callable[[], nn.Module] = mlp,
    rule: Callable[..., bioopt.LocalRule] = bioopt.Hebbian,
    **options: object,
) -> list[Tensor]:
    """The weights after some steps."""
    model = network()
    play(model, rule(model, 0.1, **options))
    return weights(model)


def good(model: nn.Module, optimizer: bioopt.LocalRule, steps: int = 1) -> None:
    for _ in range(steps):
        optimizer.zero_grad()
        F.cross_entropy(model(X), Y).backward()
        optimizer.step()


def discarded(model: nn.Module, optimizer: bioopt.LocalRule) -> None:
    model(X + 50)
    good(model, optimizer)


def discarded_later(model: nn.Module, optimizer: bioopt.LocalRule) -> None:
    optimizer.zero_grad()
    loss = F.cross_entropy(model(X), Y)
    model(X + 50)
    loss.backward()
    model(X + 70)
    optimizer.step()


def skipped_without_backward(model: nn.Module, optimizer: bioopt.LocalRule) -> None:
    for x in (X * torch.nan, X):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), Y)
        if not loss.isfinite():
            continue
        loss.backward()
        optimizer.step()


def skipped_after_backward(model: nn.Module, optimizer: bioopt.LocalRule) -> None:
    for x in (X + 50, X - 50, X):
        F.cross_entropy(model(x), Y).backward()
        if x is not X:
            optimizer.zero_grad()
            continue
        optimizer.step()


def skipped_by_the_model(model: nn.Module, optimizer: bioopt.LocalRule) -> None:
    F.cross_entropy(model(X + 50), Y).backward()
    model.zero_grad()
    loss = F.cross_entropy(model(X), Y)
    with pytest.warns(UserWarning, match=r"\.grad was set to None after a backward pass.* dropped"):
        loss.backward()
    optimizer.step()


def discarded_by_name(model: nn.Module, optimizer: bioopt.LocalRule) -> None:
    loss = F.cross_entropy(model(X + 50), Y)
    optimizer.discard()
    loss.backward()  # too late
    good(model, optimizer)


def sent_backward_twice(model: nn.Module, optimizer: bioopt.LocalRule) -> None:
    optimizer.zero_grad()
    out = model(X)
    loss = F.cross_entropy(out, Y)
    (loss / 2).backward(retain_graph=True)
    (loss / 2).backward()
    optimizer.step()


@pytest.mark.parametrize(
    "play",
    [discarded, discarded_later, skipped_without_backward, skipped_after_backward, skipped_by_the_model,
     discarded_by_name, sent_backward_twice],
)  # fmt: skip
@pytest.mark.parametrize("first", [False, True], ids=["later", "at the first step"])
def test_what_is_thrown_away_teaches_nothing(play, first: bool) -> None:
    wanted = after(lambda model, optimizer: good(model, optimizer, 1 if first else 3))
    got = after(lambda model, optimizer: (None if first else good(model, optimizer, 2), play(model, optimizer)))
    for a, b in zip(wanted, got, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


@one_pass
def test_every_rule_skips_a_discarded_batch(case: Case) -> None:
    results = []
    for discard in (False, True):
        model = case.cnn(dropout=0.0)
        optimizer = case.make(model, readout="delta")
        for i in range(3):
            if discard and i:  # STDP takes what comes before the first backward pass for one sequence
                kept = copy.deepcopy(model[1].state_dict())
                model(3 * batch(10 + i)[0])
                model[1].load_state_dict(kept)
                if isinstance(optimizer, bioopt.ContrastiveDivergence):
                    optimizer._firings = 0  # its samples are drawn by the number of the firing
            optimizer.zero_grad()
            F.cross_entropy(model(batch(i)[0]), batch(i)[1]).backward()
            optimizer.step()
        results.append(weights(model))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_accumulation_counts_each_micro_batch_once() -> None:
    def play(model: nn.Module, optimizer: bioopt.LocalRule) -> None:
        optimizer.zero_grad()
        for x, y in zip(X.split(2), Y.split(2), strict=True):
            (F.cross_entropy(model(x), y) / 4).backward()
        optimizer.step()

    for a, b in zip(after(good), after(play), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


class Siamese(nn.Module):
    """The same trunk twice."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.trunk, self.head = nn.Linear(3, 5).double(), nn.Linear(10, 4).double()

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.cat([torch.tanh(self.trunk(half)) for half in x.chunk(2, 1)], 1))


def test_siamese_trunks_learn_from_both_sides() -> None:
    class Together(Siamese):
        def forward(self, x: Tensor) -> Tensor:
            one, two = torch.tanh(self.trunk(torch.cat(x.chunk(2, 1)))).chunk(2)
            return self.head(torch.cat([one, two], 1))

    rule = published.Hebbian  # under homeostasis, the side that fires first sets the level of the first step
    for a, b in zip(after(good, Siamese, rule), after(good, Together, rule), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


class Recurrent(nn.Module):
    """A readout at each step."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.cell, self.head = nn.Linear(6, 5).double(), nn.Linear(5, 4).double()

    def forward(self, x: Tensor) -> list[Tensor]:
        h, scores = torch.zeros(len(x), 5, dtype=x.dtype), []
        for _ in range(3):
            h = torch.tanh(self.cell(torch.cat([x[:, :1], h], 1)))
            scores.append(self.head(h))
        return scores


@pytest.mark.parametrize("steps", [[2], [0, 1, 2]])
def test_a_loss_on_some_steps_of_a_recurrent_network_reaches_all_before(steps: list[int]) -> None:
    model = Recurrent()
    optimizer = published.Hebbian(model, 0.1)

    def loss() -> Tensor:
        scores = model(X)
        return sum(F.cross_entropy(scores[step], Y) for step in steps)

    loss().backward()
    (sums,) = optimizer._confirmed.values()
    assert sums.events == 24  # 3 firings of 8 samples
    model.eval()
    (wanted,) = torch.autograd.grad(loss(), model.head.weight)
    torch.testing.assert_close(model.head.weight.grad, wanted)
    model.train()
    before = model.cell.weight.clone()
    optimizer.step()
    assert not torch.equal(before, model.cell.weight)


def test_a_loss_on_an_early_step_alone() -> None:
    model = Recurrent()
    optimizer = published.Hebbian(model, 0.1)
    F.cross_entropy(model(X)[0], Y).backward()
    (sums,) = optimizer._confirmed.values()
    assert sums.events == 8  # the later firings had no part in it
    optimizer.step()


def test_without_gradients_a_firing_counts_at_once() -> None:
    model, twin = mlp(sizes=(6, 5, 5, 4)), mlp(sizes=(6, 5, 5, 4))
    optimizer, other = published.Hebbian(model, 0.1), published.Hebbian(twin, 0.1)
    with torch.no_grad():
        hidden = model[:4](X)
    optimizer.zero_grad()  # does not drop it
    F.cross_entropy(model[4:](hidden), Y).backward()
    optimizer.step()
    good(twin, other)
    assert same(weights(model), weights(twin))


@pytest.mark.parametrize("readout", [None, "frozen"])
def test_where_nothing_learns_from_a_loss_all_counts_at_once(readout: str | None) -> None:
    model = mlp(sizes=(6, 5, 5, 4))
    optimizer = published.Hebbian(model, 0.1, **({"readout": None} if readout is None else {}))
    if readout == "frozen":
        model[4].requires_grad_(False)
    model(X)
    optimizer.zero_grad()
    model(X)
    assert {synapse.name: sums.events for synapse, sums in optimizer._sums.items()} == dict.fromkeys(
        ("0", "2") if readout else ("0", "2", "4"), 16
    )
    optimizer.discard()
    with pytest.raises(RuntimeError, match="no synapse has fired"):
        optimizer.step()


def test_layers_that_no_gradient_reaches_count_at_once_with_one_warning() -> None:
    class Steps(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return (x > 0).to(x.dtype)

    model = nn.Sequential(nn.Linear(6, 5), Steps(), nn.Linear(5, 5), nn.Tanh(), nn.Linear(5, 4)).double()
    twin = copy.deepcopy(model)
    optimizer, other = published.Hebbian(model, 0.1), published.Hebbian(twin[:3], 0.1, readout=None)
    with pytest.warns(UserWarning, match=r"did not reach layer '0': between it and the readout '4' .* counts at once"):
        good(model, optimizer)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        good(model, optimizer)
    for _ in range(2):
        twin(X)
        other.step()
    assert same(weights(model[:3]), weights(twin[:3]))


def test_a_layer_that_a_loss_reaches_later_waits_from_then_on() -> None:
    class Branches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.one, self.two, self.head = nn.Linear(6, 5).double(), nn.Linear(6, 5).double(), nn.Linear(5, 4).double()

        def forward(self, x: Tensor, second: bool) -> Tensor:
            one, two = torch.tanh(self.one(x)), torch.tanh(self.two(x))
            return self.head(two if second else one)

    model = Branches()
    optimizer = published.Hebbian(model, 0.1)
    with pytest.warns(UserWarning, match="did not reach layer 'two'"):
        optimizer.step(lambda: F.cross_entropy(model(X, False), Y))
    optimizer.step(lambda: F.cross_entropy(model(X, True), Y))
    model(X + 50, True)  # thrown away
    before = model.two.weight.clone()
    optimizer.zero_grad()
    F.cross_entropy(model(X, False), Y).backward()
    optimizer.step()
    assert torch.equal(model.two.weight, before)


def test_reentrant_checkpointing_counts_at_once() -> None:
    results = []
    for checkpointed in (False, True):
        model = mlp(sizes=(6, 5, 5, 4))
        optimizer = published.Hebbian(model, 0.1)
        for _ in range(2):
            x = X.clone().requires_grad_()
            hidden = checkpoint(model[:4], x, use_reentrant=True) if checkpointed else model[:4](x)
            F.cross_entropy(model[4](hidden), Y).backward()
            optimizer.step()
            optimizer.zero_grad()
        results.append(weights(model))
    assert same(*results)


def test_no_gradient_crosses_a_cut() -> None:
    """None links the layers: what lies between them gets no gradient, batch norm included."""
    model = nn.Sequential(
        nn.Linear(6, 5), nn.BatchNorm1d(5), nn.ReLU(inplace=True), nn.Linear(5, 5), nn.BatchNorm1d(5), nn.Linear(5, 4)
    ).double()
    published.Hebbian(model, 0.1)
    optimizer = published.Hebbian(model, 0.1)
    x = X.clone().requires_grad_()
    F.cross_entropy(model(x), Y).backward()
    assert x.grad is None
    assert [name for name, p in model.named_parameters() if p.grad is not None] == ["5.weight", "5.bias"]
    optimizer.close()


# -- several readouts -----------------------------------------------------------------------------------------


class ActorCritic(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.trunk, self.policy, self.value = (nn.Linear(6, n).double() for n in (6, 4, 1))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        hidden = torch.tanh(self.trunk(x))
        return self.policy(hidden), self.value(hidden)


def both(model: nn.Module) -> Tensor:
    policy, value = model(X)
    return F.cross_entropy(policy, Y) + value.square().mean()


def test_a_second_head_is_named_and_learns_where_it_is_a_readout() -> None:
    model = ActorCritic()
    before = weights(model)
    optimizer = published.Hebbian(model, 0.1)
    with pytest.raises(
        RuntimeError,
        match=r"reaches layer 'policy' past the readout 'value'.*readout_layer=\['policy', 'value'\].*Mixed",
    ):
        optimizer.step(lambda: both(model))
    assert same(before, weights(model))
    optimizer.close()
    optimizer = published.Hebbian(model, 0.1, readout_layer=["policy", model.value], readout_lr=0.2)
    assert optimizer.coverage(model) == {
        "trunk.weight": "Hebbian", "trunk.bias": "frozen",
        "policy.weight": "Hebbian readout (delta)", "policy.bias": "Hebbian readout (delta)",
        "value.weight": "Hebbian readout (delta)", "value.bias": "Hebbian readout (delta)",
    }  # fmt: skip
    assert [group["lr"] for group in optimizer.param_groups] == [0.1, 0.2, 0.2]
    twin = copy.deepcopy(model).eval()
    both(twin).backward()
    optimizer.estimate(lambda: both(model))
    for name in ("policy", "value"):
        torch.testing.assert_close(getattr(model, name).weight.grad, getattr(twin, name).weight.grad)
    losses = [optimizer.step(lambda: both(model)).item() for _ in range(20)]
    assert losses[-1] < 0.9 * losses[0]


def test_a_head_may_be_frozen_and_mistakes_are_explained() -> None:
    model = ActorCritic()
    optimizer = published.Hebbian(model, 0.1, readout_layer=["policy", "value"])
    for head in (0, 1):
        optimizer.step(lambda head=head: model(X)[head].square().mean())
    optimizer.zero_grad()
    model(X)
    with pytest.raises(RuntimeError, match=r"readouts 'policy', 'value' learn from the loss, but no gradient"):
        optimizer.step()
    with pytest.raises(ValueError, match=r"readout_layer='critic' is not one of the synapses: trunk, policy, value"):
        published.Hebbian(model, 0.1, readout_layer=["policy", "critic"])
    with pytest.raises(ValueError, match=r"readout_layer=\[\] names no layer"):
        published.Hebbian(model, 0.1, readout_layer=[])
    with pytest.raises(ValueError, match="the only plastic layer, all, are readouts"):
        published.Hebbian(model, 0.1, readout_layer=["trunk", "policy", "value"])
    with pytest.raises(ValueError, match="readout='teacher' takes one readout"):
        published.Hebbian(model, 0.1, readout="teacher", readout_layer=["policy", "value"])


def test_auxiliary_heads_of_a_torchvision_model() -> None:
    torchvision = pytest.importorskip("torchvision")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of its initialisation
        model = torchvision.models.GoogLeNet(num_classes=5, init_weights=False)
    x, y = torch.randn(2, 3, 64, 64), torch.tensor([0, 1])

    def closure() -> Tensor:
        out = model(x)
        return sum(F.cross_entropy(scores, y) for scores in (out.logits, out.aux_logits1, out.aux_logits2))

    optimizer = published.Oja(model, 1e-4)
    with pytest.raises(RuntimeError, match=r"readout_layer=\['aux1.fc2', 'aux2.fc2', 'fc'\]"):
        optimizer.step(closure)
    optimizer.close()
    optimizer = published.Oja(model, 1e-4, readout_layer=["aux1.fc2", "aux2.fc2", "fc"])
    optimizer.step(closure)
    assert all(p.grad is not None for p in model.aux1.fc2.parameters())


def test_a_penalty_on_activity_is_warned_of_once() -> None:
    model = mlp(sizes=(6, 5, 5, 4))
    optimizer = published.Hebbian(model, 0.1)

    def closure() -> Tensor:
        hidden = model[:2](X)
        return F.cross_entropy(model[2:](hidden), Y) + hidden.abs().mean()

    with pytest.warns(UserWarning, match="reaches layer '0' past the readout '4' .*teaches nothing"):
        optimizer.step(closure)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.step(closure)


def test_zeros_that_a_function_makes_of_no_gradient_are_no_second_loss() -> None:
    """Functions of a user's own see zeros where there is no gradient, unless they ask for None."""

    class Double(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x: Tensor) -> Tensor:
            return 2 * x

        @staticmethod
        def backward(ctx, grad: Tensor) -> Tensor:
            assert grad is not None
            return 2 * grad

    model = mlp(sizes=(6, 5, 5, 4))
    optimizer = published.Hebbian(model, 0.1)
    optimizer.step(lambda: F.cross_entropy(model[2:](Double.apply(model[:2](X))), Y))
    assert not optimizer._unreachable


# -- several backward passes through one forward pass ------------------------------------------------------------


def twice(model: nn.Module, optimizer: bioopt.LocalRule) -> None:
    loss = F.cross_entropy(model(X), Y)
    loss.backward(retain_graph=True)
    optimizer.zero_grad()  # a second backward pass brings it again
    loss.backward()
    optimizer.step()


def surgery(model: nn.Module, optimizer: bioopt.LocalRule) -> None:
    """Gradients of two tasks, each by itself, added up by hand."""
    losses = F.cross_entropy(model(X), Y, reduction="none")
    grads = []
    for part in (losses[:4].sum() / 8, losses[4:].sum() / 8):
        optimizer.zero_grad()
        part.backward(retain_graph=True)
        grads.append([None if p.grad is None else p.grad.clone() for p in model.parameters()])
    for p, one, two in zip(model.parameters(), *grads, strict=True):
        p.grad = None if one is None or two is None else one + two
    optimizer.step()


def probed(model: nn.Module, optimizer: bioopt.LocalRule) -> None:
    """Gradients of the loss are looked at first."""
    loss = F.cross_entropy(model(X), Y)
    optimizer.zero_grad()
    torch.autograd.grad(loss, [*model.parameters()], retain_graph=True, allow_unused=True)
    loss.backward()
    optimizer.step()


def by_hand(model: nn.Module, optimizer: bioopt.LocalRule) -> None:
    """Gradients are kept aside while others are made and dropped."""
    loss = F.cross_entropy(model(X), Y)
    optimizer.zero_grad()
    loss.backward()
    kept = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
    optimizer.zero_grad()
    for p, grad in zip(model.parameters(), kept, strict=True):
        p.grad = grad
    optimizer.step()


@pytest.mark.filterwarnings("ignore:.*no backward pass has gone through the layers")
@pytest.mark.parametrize("play", [twice, surgery, probed, by_hand])
@pytest.mark.parametrize("first", [False, True], ids=["later", "at the first step"])
def test_one_forward_pass_counts_once_however_often_it_is_sent_backward(play, first: bool) -> None:
    wanted = after(lambda model, optimizer: good(model, optimizer, 1 if first else 3))
    got = after(lambda model, optimizer: (None if first else good(model, optimizer, 2), play(model, optimizer)))
    for a, b in zip(wanted, got, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


class Blocks(nn.Module):
    """Two blocks, each with a head and a loss of its own."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.one, self.head1, self.two, self.head2 = (
            nn.Linear(a, b).double() for a, b in ((6, 5), (5, 4), (5, 5), (5, 4))
        )

    def forward(self, x: Tensor) -> list[Tensor]:
        hidden = torch.tanh(self.one(x))
        return [self.head1(hidden), self.head2(torch.tanh(self.two(hidden)))]


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_two_rules_with_losses_of_their_own(order: tuple[int, int]) -> None:
    """The loss of the upper block reaches the lower block as well, which is not its to teach."""
    model, twin = Blocks(), Blocks()
    rules = [published.Hebbian([model.one, model.head1], 0.1), published.Oja([model.two, model.head2], 0.1)]
    scores = model(X)
    for i in order:
        F.cross_entropy(scores[i], Y).backward()  # no retain_graph: nothing between the layers runs twice
    for rule in rules:
        rule.step()
    alone = published.Hebbian([twin.one, twin.head1], 0.1)
    F.cross_entropy(twin(X)[0], Y).backward()
    alone.step()
    assert not torch.equal(model.two.weight, twin.two.weight)
    torch.testing.assert_close(model.one.weight, twin.one.weight, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("first", [False, True])
def test_gradients_of_the_readout_made_by_other_means(first: bool) -> None:
    """autograd.grad goes through no layer: what is still there counts, with one warning."""

    def play(model: nn.Module, optimizer: bioopt.LocalRule) -> None:
        if not first:
            good(model, optimizer)
        optimizer.zero_grad()
        model(X + 50)  # thrown away
        loss = F.cross_entropy(model(X), Y)
        params = [*model[2].parameters()]
        for p, grad in zip(params, torch.autograd.grad(loss, params), strict=True):
            p.grad = grad
        with pytest.warns(UserWarning, match="did not reach layer '0'" if first else "has a gradient, but no backward"):
            optimizer.step()

    got = after(play)
    if not first:
        for a, b in zip(after(lambda model, optimizer: good(model, optimizer, 2)), got, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


# -- nothing of a user's own runs backward -----------------------------------------------------------------------


class Stateful(nn.Module):
    """Keeps its activity from step to step, with its graph."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.cell, self.head = nn.Linear(11, 5).double(), nn.Linear(5, 4).double()
        self.hidden = torch.zeros(8, 5, dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        self.hidden = torch.tanh(self.cell(torch.cat([x, self.hidden], 1)))
        return self.head(self.hidden)


def test_a_state_kept_between_steps_needs_no_detach_and_does_not_grow() -> None:
    model, twin = Stateful(), Stateful()
    optimizer, other = published.Hebbian(model, 0.1), published.Hebbian(twin, 0.1)
    for _ in range(5):
        good(model, optimizer)
        good(twin, other)
        twin.hidden = twin.hidden.detach()
    assert same(weights(model), weights(twin))
    nodes = [sum(1 for _ in graph(model.hidden))]
    for _ in range(5):
        good(model, optimizer)
    nodes.append(sum(1 for _ in graph(model.hidden)))
    assert nodes[0] == nodes[1] < 12


def graph(tensor: Tensor):
    from bioopt.core.reach import graph_behind

    return graph_behind([tensor.grad_fn])


class NoDerivative(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        return (x > 0).to(x.dtype)


class InPlace(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        x = torch.sigmoid(x)
        x[:, 0] = 0
        return x


class Step(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.heaviside(x, x.new_zeros(()))


class Custom(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return NoDerivative.apply(x)


@pytest.mark.parametrize("between", [InPlace, Step, Custom])
def test_what_lies_between_layers_needs_no_derivative(between: type) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), between(), nn.Linear(5, 5), between(), nn.Linear(5, 4)).double()
    optimizer = published.Hebbian(model, 0.1)
    model[1].register_full_backward_hook(lambda *of: pytest.fail("it runs backward"))
    before = weights(model)
    good(model, optimizer, 2)
    assert not torch.equal(before[0], model[0].weight)
    model(X + 50)
    kept = weights(model)
    optimizer.zero_grad()
    with pytest.raises(RuntimeError, match="no gradient has reached"):
        optimizer.step()
    assert same(kept, weights(model))


def test_layers_keep_nothing_of_each_other() -> None:
    """Saved activities of a deep network are gone as soon as the next layer has fired."""
    import weakref

    seen: list[weakref.ref[Tensor]] = []
    model = mlp(sizes=(6, 5, 5, 5, 5, 4))
    for layer in model[1::2]:
        layer.register_forward_hook(lambda m, args, out: seen.append(weakref.ref(out)))
    optimizer = published.Hebbian(model, 0.1)
    loss = F.cross_entropy(model(X), Y)
    assert [ref() is None for ref in seen] == [True] * 4
    loss.backward()
    optimizer.step()


def test_a_loss_of_spikes_reaches_what_makes_them() -> None:
    """A learnable threshold gets its gradient, as without a rule."""

    class Threshold(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.level = nn.Parameter(torch.tensor(0.2))

        def forward(self, u: Tensor) -> Tensor:
            slope = torch.sigmoid(4 * (u - self.level))
            return (u > self.level).to(u.dtype) + (slope - slope.detach())

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), Threshold(), nn.Linear(5, 4))
    optimizer = bioopt.STDP(model, 0.1)
    spikes = []
    model[1].register_forward_hook(lambda m, args, out: spikes.append(out))
    loss = F.cross_entropy(model((X > 0).float()), Y) + spikes[0].mean()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that the layer beneath learns nothing of it
        loss.backward()
        optimizer.step()
    assert model[1].level.grad is not None
    assert model[1].level.grad != 0


def test_stdp_skips_a_batch_whose_loss_is_still_there() -> None:
    results = []
    for skip in (False, True):
        torch.manual_seed(0)
        model = spiking_mlp(dtype=torch.float32)
        optimizer = bioopt.STDP(model, 0.1)
        for i in range(4):
            x = (X + i).float()[: 8 if i != 2 else 5]
            if i == 2 and not skip:
                continue
            optimizer.zero_grad()
            loss = F.cross_entropy(model(x), Y[: len(x)])
            if i == 2:
                continue  # `loss` is alive while the next pass runs
            loss.backward()
            optimizer.step()
        results.append(weights(model))
    assert same(*results)


# -- time and memory of the links ---------------------------------------------------------------------------------


class Leaky(nn.Module):
    """A potential that is carried from step to step without a layer between."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.one, self.two, self.head = (nn.Linear(a, b).double() for a, b in ((6, 5), (5, 5), (5, 4)))
        self.kept: Tensor | float = 0.0

    def forward(self, x: Tensor, steps: int) -> Tensor:
        v, w, scores = self.kept, 0.0, 0.0
        for _ in range(steps):
            v = 0.9 * v + self.one(x)
            w = 0.9 * w + self.two(torch.sigmoid(v))
            scores = scores + self.head(torch.sigmoid(w))
        self.kept = v
        return scores


def edges(tensor: Tensor) -> int:
    return sum(len(node.next_functions) for node in graph(tensor))


def test_links_grow_with_the_length_of_a_sequence_not_with_its_square() -> None:
    model = Leaky()
    optimizer = published.Hebbian(model, 0.1)
    counts = []
    for steps in (20, 40, 80):
        model.kept = 0.0
        scores = model(X, steps)
        counts.append(edges(scores))
    assert counts[2] - counts[1] == 2 * (counts[1] - counts[0])
    F.cross_entropy(scores, Y).backward()
    assert {s.name: sums.events for s, sums in optimizer._confirmed.items()} == {"one": 640, "two": 640}
    optimizer.step()


def test_a_state_carried_linearly_keeps_no_products_and_no_links() -> None:
    model = Leaky()
    optimizer = published.Hebbian(model, 1e-3)
    counts, first = [], None
    for _ in range(30):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(X, 1), Y)
        counts.append(edges(loss))  # the graph of the state is not among them
        loss.backward()
        pending = optimizer._confirmed[next(s for s in optimizer._confirmed if s.name == "one")]
        first = first or pending
        assert pending.events == 8
        optimizer.step()
    assert counts[5] == counts[29]
    assert not first.values  # the graph of the state still holds the firing


def test_functions_of_a_users_own_may_have_tokens() -> None:
    class Own(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x: Tensor) -> Tensor:
            ctx.tokens = ctx.firing = [1, 2, 3]
            return 2 * x

        @staticmethod
        def backward(ctx, grad: Tensor) -> Tensor:
            return 2 * grad

    class Between(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return Own.apply(x)

    model = nn.Sequential(nn.Linear(6, 5), Between(), nn.Linear(5, 5), Between(), nn.Linear(5, 4)).double()
    optimizer = published.Hebbian(model, 0.1)
    good(model, optimizer)
    assert not optimizer._unreachable


def test_backward_with_inputs_is_warned_of_and_the_last_pass_counts() -> None:
    results = []
    for chosen in (False, True):
        model = mlp(sizes=(6, 5, 5, 4))
        optimizer = published.Hebbian(model, 0.1)
        good(model, optimizer)
        with pytest.warns(UserWarning, match="no backward pass") if chosen else warnings.catch_warnings():
            for _ in range(3):
                optimizer.zero_grad()
                F.cross_entropy(model(X), Y).backward(inputs=[*model.parameters()] if chosen else None)
                optimizer.step()
        results.append(weights(model))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


def test_a_resting_readout_is_no_mistake() -> None:
    model = ActorCritic()
    optimizer = published.Hebbian(model, 0.1, readout_layer=["policy", "value"])
    model.value.requires_grad_(False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.step(lambda: both(model))
