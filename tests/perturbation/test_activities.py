"""Node perturbation, against slow twins and against autograd."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import bioopt
from bioopt.core.noise import NoiseSource, fill_normal_, fill_rademacher_

from ..rules import mlp, ordinary, per_sample, same, weights
from .common import X, Y, deviation, estimate, flat, losses_of


@pytest.mark.parametrize("samples", [1, 3])
@pytest.mark.parametrize("credit", ["sample", "global"])
@pytest.mark.parametrize("distribution", ["normal", "rademacher"])
@pytest.mark.parametrize("relative", [True, False])
def test_node_perturbation_equals_its_twin(samples: int, credit: str, distribution: str, relative: bool) -> None:
    """One sample, one synapse, one noisy pass at a time."""
    model, sigma = mlp(), 0.1
    options = {"samples": samples, "credit": credit, "distribution": distribution, "relative": relative}
    options["sigma"] = sigma
    optimizer = bioopt.NodePerturbation(model, 0.1, seed=2, **options)
    first, second = model[0], model[2]
    wanted = [torch.zeros_like(p) for p in model.parameters()]
    with torch.no_grad():
        hidden = torch.tanh(first(X))
        clean = F.cross_entropy(second(hidden), Y, reduction="none")
        width = [sigma * deviation(u) if relative else sigma for u in (first(X), second(hidden))]
        for sample in range(samples):
            stream = NoiseSource().stream(torch.device("cpu"), 2, 0, sample)
            fill = fill_normal_ if distribution == "normal" else fill_rademacher_
            xi = [fill(torch.empty(8, n, dtype=torch.float64), stream) for n in (5, 4)]
            out = second(torch.tanh(first(X) + width[0] * xi[0])) + width[1] * xi[1]
            noisy = F.cross_entropy(out, Y, reduction="none")
            for b in range(8):
                change = noisy[b] - clean[b] if credit == "sample" else (noisy - clean).mean() * 8
                for i, (x, noise) in enumerate(((X, xi[0]), (hidden, xi[1]))):
                    for k in range(noise.shape[1]):
                        signal = change / width[i] * noise[b, k] / (8 * samples)
                        wanted[2 * i][k] += signal * x[b]
                        wanted[2 * i + 1][k] += signal
    for a, b in zip(wanted, estimate(optimizer, model), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def decorrelating_twin(patches: Tensor, signal: Tensor, matrix: Tensor, rate: float) -> tuple[Tensor, Tensor]:
    """Of one pool: the change of W and the next R, event by event. ``patches`` E×D, ``signal`` E×K, one a sample."""
    seen = torch.stack([matrix @ x for x in patches])
    # V sees R x; its step, carried over to W = V R.
    change = sum(torch.outer(s, x) for s, x in zip(signal, seen, strict=True)) @ matrix
    moment = sum(torch.outer(x, x) for x in seen) / len(seen)
    return change, matrix - rate * (moment - moment.diag().diag()) @ matrix


@pytest.mark.parametrize(
    "build",
    [
        lambda: nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4)),
        lambda: nn.Sequential(
            nn.Unflatten(1, (2, 3)), nn.Conv1d(2, 4, 2, groups=2, padding=1, padding_mode="circular"), nn.Tanh(),
            nn.Flatten(), nn.Linear(16, 4, bias=False)),
        lambda: nn.Sequential(
            nn.Unflatten(1, (1, 2, 3)), nn.Conv2d(1, 3, 2, stride=(1, 2), padding=1), nn.Tanh(), nn.Flatten(),
            nn.Linear(18, 4)),
    ],
    ids=["linear", "grouped", "strided"],
)  # fmt: skip
def test_decorrelation_equals_its_twin(build) -> None:
    """Against the plain rule's own signals, over two steps, the second with matrices that are not the identity."""
    torch.manual_seed(0)
    model, rate = build().double(), 0.05
    optimizer = bioopt.NodePerturbation(model, 0.0, sigma=0.1, samples=2, decorrelation=rate)
    plain = bioopt.NodePerturbation(model, 0.0, sigma=0.1, samples=2)
    synapses = [m for m in model if hasattr(m, "weight")]
    matrices: dict[tuple[int, int], Tensor] = {}
    for _ in range(2):
        for rule in (plain, optimizer):  # lr is 0: both see the same model, and the same noise
            rule.step(lambda: losses_of(model))
            if rule is plain:
                signal = [layer.weight.grad.clone() for layer in synapses]
        x = X
        for module in model:
            if module in synapses:
                i = synapses.index(module)
                pools, size = getattr(module, "groups", 1), module.weight[0].numel()
                identity = torch.eye(size, dtype=x.dtype).view(size, *module.weight.shape[1:])
                for pool in range(pools):
                    rows = slice(pool * len(module.weight) // pools, (pool + 1) * len(module.weight) // pools)
                    if isinstance(module, nn.Linear):
                        patches = x
                    else:
                        alone = type(module)(
                            module.weight.shape[1], size, module.kernel_size, module.stride, module.padding,
                            bias=False, padding_mode=module.padding_mode).double()  # fmt: skip
                        alone.weight.data = identity
                        part = x[:, pool * module.weight.shape[1] : (pool + 1) * module.weight.shape[1]]
                        patches = alone(part).detach().flatten(2).transpose(1, 2).reshape(-1, size)
                    matrix = matrices.get((i, pool), torch.eye(size, dtype=x.dtype))
                    # <s x> R' R, with the plain rule's <s x>
                    wanted = signal[i].reshape(len(module.weight), size)[rows] @ matrix.T @ matrix
                    got = module.weight.grad.reshape(len(module.weight), size)[rows]
                    torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-12)
                    _, matrices[i, pool] = decorrelating_twin(
                        patches, torch.zeros(len(patches), 1).double(), matrix, rate
                    )
            x = module(x).detach()
    kept = optimizer.state_dict()["state"]["rule"]["decorrelation"]
    for (i, pool), matrix in matrices.items():
        torch.testing.assert_close(kept[i][pool], matrix, rtol=1e-9, atol=1e-12)
        assert not torch.equal(matrix, torch.eye(len(matrix), dtype=matrix.dtype))


def test_decorrelated_plasticity_is_that_of_weights_behind_the_matrix() -> None:
    generator = torch.Generator().manual_seed(0)
    x, signal = torch.randn(9, 4, generator=generator), torch.randn(9, 3, generator=generator)
    matrix = torch.randn(4, 4, generator=generator)
    change, _ = decorrelating_twin(x, signal, matrix, 0.0)
    torch.testing.assert_close(change, (signal.T @ x) @ matrix.T @ matrix)


@pytest.mark.long
def test_decorrelation_decorrelates() -> None:
    torch.manual_seed(0)
    model = nn.Linear(5, 2)
    mixing = torch.eye(5) + 0.4
    optimizer = bioopt.NodePerturbation(model, 0.0, sigma=0.1, decorrelation=0.05)
    for _ in range(400):
        x = torch.randn(50, 5) @ mixing
        optimizer.step(lambda x=x: model(x).square().sum(1))
    matrix = optimizer.state_dict()["state"]["rule"]["decorrelation"][0][0]

    def correlation(data: Tensor) -> float:
        return (torch.corrcoef(data.T) - torch.eye(5)).abs().max().item()

    x = torch.randn(5000, 5) @ mixing
    assert correlation(x) > 0.5
    assert correlation(x @ matrix.T) < 0.1


def test_decorrelation_goes_on_from_a_checkpoint_and_differs_between_groups() -> None:
    def made() -> tuple[nn.Module, bioopt.LearningRule]:
        model = mlp()
        groups = [{"params": [model[0]]}, {"params": [model[2]], "decorrelation": 0.0}]
        return model, bioopt.NodePerturbation(groups, 0.1, sigma=0.1, decorrelation=0.05)

    model, optimizer = made()
    for _ in range(2):
        optimizer.step(lambda: losses_of(model))
    twin, other = made()
    twin.load_state_dict(model.state_dict())
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert list(other.state_dict()["state"]["rule"]["decorrelation"]) == [0]
    optimizer.step(lambda: losses_of(model))
    other.step(lambda: losses_of(twin))
    assert same(weights(model), weights(twin))


def test_decorrelation_that_diverges_or_has_no_layer_is_explained() -> None:
    model = mlp()
    optimizer = bioopt.NodePerturbation(model, 0.1, sigma=0.1, decorrelation=1e90)
    optimizer.step(lambda: losses_of(model))
    before, state = weights(model), str(optimizer.state_dict())
    with pytest.raises(RuntimeError, match=r"decorrelation=1e\+90 has diverged at layer '0'; nothing was changed. Try"):
        optimizer.step(lambda: losses_of(model))
    assert same(before, weights(model))
    assert state == str(optimizer.state_dict())

    class Own(nn.Linear):
        pass

    bioopt.register_synapse(Own, channel_dim=-1)
    with pytest.raises(ValueError, match="not the Own '0': give it a group with decorrelation=0"):
        bioopt.NodePerturbation(nn.Sequential(Own(2, 3)), 0.1, sigma=0.1, decorrelation=0.1)


def convolutions() -> nn.Sequential:
    torch.manual_seed(0)
    layers = (nn.Conv2d(2, 4, 3), nn.ReLU(inplace=True), nn.Flatten(), nn.Dropout(0.3), nn.Linear(36, 4))
    return nn.Sequential(nn.Unflatten(1, (2, 5, 5)), *layers).double()


def frozen_beneath() -> nn.Sequential:
    """A frozen layer with batch norm in training mode, beneath all noise."""
    model = convolutions()
    model.insert(2, nn.BatchNorm2d(4, affine=False).double())
    model[1].requires_grad_(False)
    return model


@pytest.mark.parametrize("credit", ["sample", "global"])
@pytest.mark.parametrize("build", [lambda: mlp(sizes=(50, 5, 4)), convolutions, frozen_beneath])
def test_noisy_passes_at_once_equal_those_one_by_one(build, credit: str) -> None:
    x = torch.randn(8, 50, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    found = []
    for batched in (False, True):
        model, calls = build(), 0
        optimizer = bioopt.NodePerturbation(model, 0.1, sigma=0.1, samples=3, credit=credit, batched=batched)
        torch.manual_seed(0)

        def closure(model=model) -> Tensor:
            nonlocal calls
            calls += 1
            return F.cross_entropy(model(x), Y, reduction="none")

        optimizer.step(closure)  # after two evaluations that see that the closure is repeatable
        assert (calls, optimizer.forward_passes) == ((4 if batched else 6), 6)
        losses = optimizer.step(closure)
        assert (calls, optimizer.forward_passes) == ((6 if batched else 10), 4)
        assert optimizer.batched == batched
        found.append([losses, torch.get_rng_state().double(), *weights(model), *model.buffers()])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    ("norm", "closure"),
    [
        (True, lambda optimizer, model: losses_of(model)),
        (False, lambda optimizer, model: losses_of(model).mean().item()),
        (False, lambda optimizer, model: per_sample(optimizer, model, X, Y)()),
        (False, lambda optimizer, model: ordinary(optimizer, model, X, Y)()),
    ],
    ids=["batch norm", "number", "backward where needed", "backward always"],
)
@pytest.mark.filterwarnings("ignore:NodePerturbation needs no backward pass")
def test_what_vmap_cannot_run_is_run_pass_by_pass(norm: bool, closure) -> None:
    found = []
    for batched in (False, True):
        model = mlp()
        if norm:
            model.insert(1, nn.BatchNorm1d(5).double())
        optimizer = bioopt.NodePerturbation(model, 0.1, sigma=0.1, samples=3, batched=batched)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for _ in range(2):
                optimizer.step(lambda model=model, optimizer=optimizer: closure(optimizer, model))
        messages = [str(w.message) for w in caught if "vmap cannot run" in str(w.message)]
        assert len(messages) <= batched
        found.append([*weights(model), *model.buffers()])
        if batched and norm:
            assert "Batch norm" in messages[0]
            assert caught[-1].filename == __file__
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("batched", [False, True])
@pytest.mark.parametrize("more", [False, True])
@pytest.mark.filterwarnings("ignore:.*vmap cannot run this closure")
def test_other_layers_in_the_noisy_pass_are_refused(batched: bool, more: bool) -> None:
    model, calls = mlp(), 0
    optimizer = bioopt.NodePerturbation(model, 0.1, sigma=0.1, samples=2, batched=batched)

    def closure() -> Tensor:
        nonlocal calls
        calls += 1
        twice = calls > 3 if more else calls <= 3
        return losses_of(model) + (model[0](X).sum() if twice else 0)

    before = weights(model)
    with pytest.raises(RuntimeError, match="ran other layers in the noisy pass"):
        optimizer.step(closure)
    assert same(before, weights(model))


@pytest.mark.parametrize(
    "build",
    [lambda: nn.Conv2d(2, 3, 3, padding=1, padding_mode="reflect"), lambda: nn.Conv2d(2, 4, 3, stride=2, groups=2)],
)
def test_node_perturbation_of_convolutions(build) -> None:
    torch.manual_seed(0)
    conv = build()
    size = conv(torch.zeros(1, 2, 5, 5)).numel()
    model = nn.Sequential(conv, nn.Tanh(), nn.Flatten(), nn.Linear(size, 3)).double()
    x, y = torch.randn(40, 2, 5, 5, dtype=torch.float64), torch.randint(3, (40,))
    true = flat(list(torch.autograd.grad(F.cross_entropy(model(x), y), list(model.parameters()))))
    optimizer = bioopt.NodePerturbation(model, 0.1, sigma=1e-4, samples=100, batched=True)
    total = torch.zeros_like(true)
    for _ in range(30):
        total += flat(estimate(optimizer, model, lambda: F.cross_entropy(model(x), y, reduction="none")))
    assert F.cosine_similarity(total, true, dim=0) > 0.97
    assert abs((total / 30 @ true) / (true @ true) - 1) < 0.1


def test_credit_that_cannot_be_given_is_explained() -> None:
    model = nn.Sequential(nn.Linear(6, 5), nn.Flatten(0), nn.Unflatten(0, (-1, 5)), nn.Linear(5, 4))
    sequence = torch.randn(7, 2, 6)  # time first: two samples
    optimizer = bioopt.NodePerturbation(model, 0.1, sigma=0.1)

    def closure() -> Tensor:
        return model(sequence).view(7, 2, 4).square().mean((0, 2))

    before = weights(model)
    with pytest.raises(RuntimeError, match=r"credit='sample'.*layer '0'.*\(7, 2, 5\).*2 losses.*credit='global'"):
        optimizer.step(closure)
    assert same(before, weights(model))
    bioopt.NodePerturbation(model, 0.1, sigma=0.1, credit="global").step(closure)
    optimizer.step(lambda: closure().mean())  # a scalar loss is global by itself
    with pytest.raises(ValueError, match="credit='other' must be 'sample' or 'global'"):
        bioopt.NodePerturbation(model, 0.1, sigma=0.1, credit="other")


def test_layers_that_decorrelate_are_not_whitened() -> None:
    """Whether the option is that of the rule or of a group; nor those that did so before."""
    found = []
    for by_group in (True, False):
        model = nn.Sequential(nn.Unflatten(1, (2, 5, 5)), nn.Conv2d(2, 4, 3), nn.Conv2d(4, 3, 2), nn.Flatten(),
                              nn.Linear(12, 4)).double()  # fmt: skip
        with torch.no_grad():
            for p in model.parameters():
                p.copy_(torch.linspace(-0.3, 0.3, p.numel()).view_as(p))
        x, y = torch.linspace(-1, 1, 400).sin().view(8, 50).double(), torch.arange(8) % 4
        groups = [{"params": [model[1]]}, {"params": [model[2], model[4]]}]
        groups[0 if by_group else 1]["decorrelation"] = 0.01 if by_group else 0.0
        optimizer = bioopt.NodePerturbation(groups, decorrelation=0.0 if by_group else 0.01)
        for _ in range(3):
            optimizer.step(lambda model=model, x=x, y=y: F.cross_entropy(model(x), y, reduction="none"))
        levels = optimizer.state_dict()["state"]["rule"]["presynaptic"]
        assert "whitening" not in levels[0]
        assert "whitening" in levels[1]
        found.append(weights(model))
    assert same(*found)
    optimizer.param_groups[1]["decorrelation"] = 0.01
    optimizer.step(lambda: F.cross_entropy(model(x), y, reduction="none"))
    assert "whitening" not in optimizer.state_dict()["state"]["rule"]["presynaptic"][1]
    chosen = bioopt.NodePerturbation(model, decorrelation=0.01, whitening=1.0)
    chosen.step(lambda: F.cross_entropy(model(x), y, reduction="none"))
    assert "whitening" in chosen.state_dict()["state"]["rule"]["presynaptic"][0]
