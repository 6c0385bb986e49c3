"""Cut, relay, inject, clamp and the output gate, each on whatever may stand around a layer."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import bioopt
from bioopt.core.acts import OutputGate, clamp, cut, detached, inject, isolate, relay

Act = Callable[[bioopt.Firing, Tensor], Tensor]


class Residual(nn.Module):
    """Two convolutions in groups, batch norm and in-place activations beside a skip connection."""

    def __init__(self, channels: int, groups: int = 2) -> None:
        super().__init__()
        self.one = nn.Conv2d(channels, channels, 3, padding=1, groups=groups, bias=False)
        self.two = nn.Conv2d(channels, channels, 3, padding=1, groups=groups)
        self.norms = nn.ModuleList([nn.BatchNorm2d(channels), nn.BatchNorm2d(channels)])

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.norms[0](self.one(x)), inplace=True)
        return F.relu(self.norms[1](self.two(h)) + x, inplace=True)


class Shared(nn.Module):
    """One layer that fires twice."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.layer = nn.Linear(size, size)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.layer(torch.tanh(self.layer(x))))


class Checkpointed(nn.Module):
    """Runs its inside again in the backward pass."""

    def __init__(self, inside: nn.Module, use_reentrant: bool) -> None:
        super().__init__()
        self.inside, self.use_reentrant = inside, use_reentrant

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.inside, x, use_reentrant=self.use_reentrant)


class Tokens(nn.Module):
    """Images as sequences: three dimensions enter a Linear layer."""

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(2).mT


def strided() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(2, 8, 3),
        nn.ReLU(inplace=True),
        nn.Conv2d(8, 8, 3, stride=2, dilation=2, groups=4),
        nn.ReLU(inplace=True),
        nn.Flatten(),
        nn.Linear(8, 5),
    )


def plain(**options: Any) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(2, 8, 3, padding=1),
        nn.ReLU(inplace=True),
        nn.Conv2d(8, 8, 3, **options),
        nn.ReLU(inplace=True),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(32, 5),
    )


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "in-place ReLU": strided,
    "batch norm": lambda: nn.Sequential(
        nn.Conv2d(2, 6, 3), nn.BatchNorm2d(6), nn.ReLU(True), nn.Conv2d(6, 4, 3), nn.BatchNorm2d(4), nn.ReLU(True),
        nn.Flatten(), nn.Linear(64, 5)
    ),
    "residuals and groups": lambda: nn.Sequential(
        nn.Conv2d(2, 8, 3), nn.ReLU(True), Residual(8), nn.MaxPool2d(2), Residual(8, 4), nn.Flatten(), nn.Linear(72, 5)
    ),
    "shared layers": lambda: nn.Sequential(nn.Flatten(), nn.Linear(128, 12), nn.Tanh(), Shared(12), nn.Linear(12, 5)),
    "checkpointing": lambda: nn.Sequential(
        nn.Conv2d(2, 8, 3), nn.ReLU(True), Checkpointed(Residual(8), False), nn.Flatten(), nn.Linear(288, 5)
    ),
    "reentrant checkpointing": lambda: nn.Sequential(
        nn.Conv2d(2, 8, 3), nn.ReLU(True), Checkpointed(Residual(8), True), nn.Flatten(), nn.Linear(288, 5)
    ),
    "circular padding": lambda: plain(padding=1, padding_mode="circular"),
    "padding to the same size": lambda: plain(padding="same", padding_mode="reflect"),
    "sequences": lambda: nn.Sequential(Tokens(), nn.Linear(2, 6), nn.Tanh(), nn.Linear(6, 3), nn.Flatten(),
                                       nn.Linear(192, 5)),
}  # fmt: skip
MODES = ["float32", "float64", "channels last", "bf16 autocast"]
without_gradients = pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")  # of checkpointing
every_network = pytest.mark.parametrize("network", NETWORKS)
every_mode = pytest.mark.parametrize("mode", MODES)


def build(network: str, mode: str = "float32") -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = NETWORKS[network]()
    if mode == "channels last":
        model = model.to(memory_format=torch.channels_last)
    return model.double() if mode == "float64" else model


def batch(mode: str = "float32") -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(6, 2, 8, 8, generator=generator), torch.randint(5, (6,), generator=generator)
    return x.double() if mode == "float64" else x, y


def loss_of(model: Callable[[Tensor], Tensor], mode: str = "float32") -> Tensor:
    x, y = batch(mode)
    with torch.autocast("cpu", torch.bfloat16, enabled=mode == "bf16 autocast"):
        return F.cross_entropy(model(x), y)


def gradients(model: nn.Module, mode: str = "float32", run: Callable[[Tensor], Tensor] | None = None) -> list[Tensor]:
    for p in model.parameters():
        p.grad = None
    loss_of(run or model, mode).backward()
    return [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in model.parameters()]


@contextlib.contextmanager
def recording(model: nn.Module, enter: Any, leave: Act) -> Iterator[bioopt.Recorder]:
    recorder = bioopt.Recorder()
    for synapse in bioopt.find_synapses(model):
        recorder.watch(synapse)
    recorder.act(enter, leave)
    try:
        yield recorder
    finally:
        recorder.close()


def take_detached(synapse: bioopt.Synapse, x: Tensor) -> Tensor:
    return detached(x)


def take_whole(synapse: bioopt.Synapse, x: Tensor) -> Tensor:
    return x


def by_own_weights(firing: bioopt.Firing, u: Tensor) -> Tensor:
    shape = firing.x.shape
    return relay(firing, u, lambda g: firing.synapse.transpose(firing.synapse.weight, g, shape))


# -- relay ------------------------------------------------------------------------------------------------------


@every_network
@every_mode
def test_a_relay_by_the_own_weights_is_backpropagation_bit_for_bit(network: str, mode: str) -> None:
    model, twin = build(network, mode), build(network, mode)
    with recording(model, take_detached, by_own_weights):
        got = gradients(model, mode)
    # Autocast computes reflections in single precision, which the error on its way back cannot know.
    exact = (network, mode) != ("padding to the same size", "bf16 autocast")
    for (name, _), a, b in zip(model.named_parameters(), got, gradients(twin, mode), strict=True):
        assert torch.equal(a, b) if exact else F.cosine_similarity(a.flatten(), b.flatten(), 0) > 0.9999, name
    for a, b in zip(model.buffers(), twin.buffers(), strict=True):
        assert torch.equal(a, b)


@every_network
def test_a_relay_without_feedback_is_a_cut(network: str) -> None:
    model = build(network)
    with recording(model, take_detached, lambda firing, u: relay(firing, u, lambda g: g.new_zeros(firing.x.shape))):
        got = dict(zip([n for n, _ in model.named_parameters()], gradients(model), strict=True))
    *beneath, _, bias = got
    assert got[bias].any()
    assert not any(got[name].any() for name in beneath)


def test_feedback_gets_the_error_at_the_layer_s_output_and_gives_that_at_its_input() -> None:
    model, x = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double(), torch.randn(5, 3).double()
    seen = {}

    def leave(firing: bioopt.Firing, u: Tensor) -> Tensor:
        def feedback(g: Tensor) -> Tensor:
            seen[firing.synapse.name] = g
            return g @ feedback_weight

        return relay(firing, u, feedback)

    feedback_weight = torch.randn(2, 4, dtype=torch.float64)
    with recording(model, take_detached, leave):
        model(x).sum().backward()
    assert torch.equal(seen["2"], torch.ones(5, 2, dtype=torch.float64))
    assert "0" not in seen  # nothing beneath learns
    h = torch.tanh(model[0](x))
    error = (torch.ones(5, 2, dtype=torch.float64) @ feedback_weight) * (1 - h**2)
    torch.testing.assert_close(model[0].weight.grad, error.T @ x, rtol=1e-12, atol=1e-14)


@pytest.mark.filterwarnings("ignore")  # of the compiler, at graph breaks
@pytest.mark.parametrize("network", ["batch norm", "residuals and groups", "in-place ReLU"])
def test_a_relay_under_torch_compile(network: str) -> None:
    model, twin = build(network), build(network)
    torch._dynamo.reset()
    with recording(model, take_detached, by_own_weights):
        got = gradients(model, run=torch.compile(model, backend="aot_eager"))
    for (name, p), a, b in zip(model.named_parameters(), got, gradients(twin), strict=True):
        if not (p.ndim == 1 and network != "in-place ReLU"):  # a bias before batch norm has no gradient but noise
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6, msg=name)


def test_a_relay_leaves_a_model_without_gradients_alone() -> None:
    model, x = build("batch norm"), batch()[0]
    with torch.no_grad():
        expected = build("batch norm")(x)
    with recording(model, take_detached, by_own_weights), torch.no_grad():
        assert torch.equal(model(x), expected)


def test_the_error_goes_back_by_the_transpose_of_a_registered_layer() -> None:
    class Masked(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return F.linear(x, self.weight * mask, self.bias)

    calls = []

    def transpose(layer: nn.Module, weight: Tensor, g: Tensor, x_shape: torch.Size) -> Tensor:
        calls.append(x_shape)
        return g @ (weight * mask)

    mask = (torch.rand(4, 4) > 0.5).float()
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), Masked(4, 4), nn.Tanh(), nn.Linear(4, 2))
    x, results = torch.randn(5, 3), []
    for own in (None, transpose):
        bioopt.register_synapse(Masked, channel_dim=-1, transpose=own)
        with recording(model, take_detached, by_own_weights):
            model.zero_grad()
            model(x).square().sum().backward()
        results.append([p.grad.clone() for p in model.parameters()])
    assert calls == [torch.Size([5, 4])]
    model.zero_grad()
    model(x).square().sum().backward()
    for expected, *both in zip([p.grad for p in model.parameters()], *results, strict=True):
        for got in both:
            torch.testing.assert_close(got, expected)


# -- cut and inject ---------------------------------------------------------------------------------------------


@without_gradients
@every_network
@every_mode
def test_a_cut_changes_no_output_and_gives_each_layer_a_graph_of_its_own(network: str, mode: str) -> None:
    model, twin = build(network, mode), build(network, mode)
    fired: list[tuple[bioopt.Firing, Tensor]] = []
    x, _ = batch(mode)

    def leave(firing: bioopt.Firing, u: Tensor) -> Tensor:
        if not firing.replay:
            (product,) = torch.autograd.grad(u, firing.synapse.weight, torch.ones_like(u), retain_graph=True)
            fired.append((firing, product))
        return cut(firing, u, recorder.reach)

    autocast = torch.autocast("cpu", torch.bfloat16, enabled=mode == "bf16 autocast")
    with recording(model, isolate, leave) as recorder, torch.no_grad(), autocast:
        got = model(x)
    with torch.no_grad(), autocast:
        assert torch.equal(got, twin(x))
    assert not got.requires_grad
    assert {firing.synapse.name for firing, _ in fired} == {s.name for s in bioopt.find_synapses(model)}
    assert all(product.shape == firing.synapse.weight.shape and product.any() for firing, product in fired)


@every_network
def test_no_error_passes_a_cut_but_the_backward_pass_has_somewhere_to_end(network: str) -> None:
    model = build(network)
    with recording(model, isolate, lambda firing, u: cut(firing, u, recorder.reach)) as recorder:
        got = gradients(model)
    layers = {f"{s.name}.{n}" for s in bioopt.find_synapses(model) for n in ("weight", "bias")}
    for (name, _), gradient in zip(model.named_parameters(), got, strict=True):
        assert name not in layers or not gradient.any(), name


@without_gradients
@every_network
@every_mode
def test_what_is_injected_is_all_that_changes(network: str, mode: str) -> None:
    model, twin = build(network, mode), build(network, mode)
    x, _ = batch(mode)
    layer = bioopt.find_synapses(model)[0]
    noise: list[Tensor] = []

    def leave(firing: bioopt.Firing, u: Tensor) -> Tensor:
        if firing.synapse.layer is not layer.layer:
            return cut(firing, u, recorder.reach)
        noise.append(torch.randn_like(u))
        return cut(firing, inject(u, noise[-1], 0.1), recorder.reach)

    autocast = torch.autocast("cpu", torch.bfloat16, enabled=mode == "bf16 autocast")
    with recording(model, isolate, leave) as recorder, torch.no_grad(), autocast:
        got = model(x)
    other = dict(twin.named_modules())[layer.name]
    rest = iter(noise)
    other.register_forward_hook(lambda layer, args, u: torch.add(u, next(rest), alpha=0.1))
    with torch.no_grad(), autocast:
        assert torch.equal(got, twin(x))


# -- clamp and the output gate ------------------------------------------------------------------------------------


@pytest.mark.parametrize("network", [n for n in NETWORKS if n != "reentrant checkpointing"])
@every_mode
def test_a_clamped_state_gets_the_gradient_of_what_is_above_it(network: str, mode: str) -> None:
    """States equal to the activity change nothing; the topmost has backpropagation's error as its gradient."""
    model, twin = build(network, mode), build(network, mode)
    states: list[tuple[bioopt.Synapse, Tensor]] = []
    outputs: list[Tensor] = []

    def state_of(firing: bioopt.Firing, u: Tensor) -> Tensor:
        if firing.replay:  # a state belongs to a firing; in this network each layer that is run again fires once
            return clamp(next(z for synapse, z in states if synapse is firing.synapse))
        states.append((firing.synapse, u.detach().clone().requires_grad_()))
        return clamp(states[-1][1])

    def keep(firing: bioopt.Firing, u: Tensor) -> Tensor:
        u = u.clone()
        if not firing.replay:
            u.retain_grad()
            outputs.append(u)
        return u.clone()

    with recording(model, take_whole, state_of), recording(twin, take_whole, keep):
        one, two = loss_of(model, mode), loss_of(twin, mode)
        assert torch.equal(one, two)
        one.backward()
        two.backward()
    assert len(states) == len(outputs)
    assert states[-1][1].grad is not None
    torch.testing.assert_close(states[-1][1].grad, outputs[-1].grad)
    assert not any(p.grad is not None and p.grad.any() for p in bioopt.find_synapses(model)[0].parameters())


def test_a_clamped_network_passes_errors_into_the_layer_beneath() -> None:
    """Predictive coding's error: the energy Σ (z - u)²/2 of a layer has a gradient at the state before it."""
    model, x = nn.Sequential(nn.Linear(3, 4), nn.ReLU(True), nn.Linear(4, 2)).double(), torch.randn(5, 3).double()
    states: list[Tensor] = []
    energy = torch.zeros((), dtype=torch.float64)

    def leave(firing: bioopt.Firing, u: Tensor) -> Tensor:
        nonlocal energy
        z = (u.detach() + 0.1).requires_grad_()
        states.append(z)
        energy = energy + (z - u).square().sum() / 2
        return clamp(z)

    with recording(model, take_whole, leave):
        model(x)
    below, above = torch.autograd.grad(energy, states)
    assert torch.allclose(above, torch.full_like(above, 0.1))
    expected = 0.1 - 0.1 * (states[0] > 0) * model[2].weight.sum(0)
    torch.testing.assert_close(below, expected)


@pytest.mark.parametrize("network", [n for n in NETWORKS if n != "reentrant checkpointing"])  # which torch refuses
@pytest.mark.parametrize("mode", ["float32", "channels last", "bf16 autocast"])
def test_below_the_output_gate_the_gradient_can_be_taken_later_and_again(network: str, mode: str) -> None:
    model, twin = build(network, mode), build(network, mode)
    readout = bioopt.find_synapses(model)[-1].layer
    gate = OutputGate()
    with recording(model, take_whole, lambda firing, u: gate(u) if firing.synapse.layer is readout else u):
        got = gradients(model, mode)
    assert not any(g.any() for g in got)  # the closure's backward pass has ended at the gate
    params = list(model.parameters())
    later = gate.gradients(params, retain_graph=True)
    for a, b in zip(later, gradients(twin, mode), strict=True):
        torch.testing.assert_close(torch.zeros_like(b) if a is None else a, b, rtol=1e-5, atol=1e-6)
    ((u, error),) = gate.errors
    assert u.requires_grad
    assert error.shape == u.shape
    if "checkpointing" not in network:
        again = gate.gradients(params)
        assert all(torch.equal(a, b) for a, b in zip(later, again, strict=True) if a is not None)


def test_a_gate_without_a_backward_pass_says_so() -> None:
    gate = OutputGate()
    gate(torch.ones(2, requires_grad=True))
    with pytest.raises(RuntimeError, match="not sent backward"):
        gate.gradients([torch.ones(2, requires_grad=True)])


# -- what is handed to a rule -------------------------------------------------------------------------------------


def test_a_firing_is_public_and_cannot_be_changed() -> None:
    model, x = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)), torch.randn(5, 3)
    firings = []
    with recording(model, take_whole, lambda firing, u: (firings.append(firing), u)[1]):
        model(x)
    assert [firing.synapse.name for firing in firings] == ["0", "2"]
    assert firings[0].x is x
    assert firings[1].x.grad_fn is not None  # raw: with the graph of the block that ends here
    with pytest.raises(AttributeError):
        firings[0].x = None


def acts(model: nn.Module) -> dict[str, tuple[Any, Callable[[bioopt.Recorder], Act]]]:
    """Each act by its name: ``enter``, and ``leave`` of a recorder."""
    readout = bioopt.find_synapses(model)[-1].layer
    gate = OutputGate()
    return {
        "cut": (isolate, lambda recorder: lambda firing, u: cut(firing, u, recorder.reach)),
        "relay": (take_detached, lambda recorder: by_own_weights),
        "inject": (
            isolate,
            lambda recorder: lambda firing, u: cut(firing, inject(u, torch.ones_like(u), 0.1), recorder.reach),
        ),
        "clamp": (take_whole, lambda recorder: lambda firing, u: clamp(u.detach().requires_grad_())),
        "gate": (take_whole, lambda recorder: lambda firing, u: gate(u) if firing.synapse.layer is readout else u),
    }


@pytest.mark.filterwarnings("ignore")  # of the compiler, at graph breaks
@pytest.mark.parametrize("act", ["cut", "relay", "inject", "clamp", "gate"])
@pytest.mark.parametrize(
    "network",
    ["batch norm", *(pytest.param(n, marks=pytest.mark.long) for n in ("residuals and groups", "shared layers"))],
)
def test_every_act_does_the_same_under_torch_compile(act: str, network: str) -> None:
    results = []
    for compiled in (False, True):
        model, (x, _) = build(network), batch()
        torch._dynamo.reset()
        enter, leave_of = acts(model)[act]
        recorder = bioopt.Recorder()
        for synapse in bioopt.find_synapses(model):
            recorder.watch(synapse)
        leave = leave_of(recorder)
        recorder.act(enter, leave)
        results.append((torch.compile(model, backend="aot_eager") if compiled else model)(x).detach())
        recorder.close()
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-6)
