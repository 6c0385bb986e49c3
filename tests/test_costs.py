"""Costs: each against a slow reference implementation."""

from __future__ import annotations

import math
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from bioopt import costs
from experiments.building import build_cost

from .commands import ROOT

NAMES = sorted(path.stem for path in (ROOT / "conf/cost").glob("*.yaml"))
LABELS = torch.tensor([0, 2, 1, 2, costs.UNLABELLED, 0])
STEPS = 3


def outputs(seed: int = 0, shape: tuple[int, ...] = (6, 4)) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def score_losses(outputs: Tensor, labels: Tensor, cost: Callable[[list[float], int], float]) -> Tensor:
    """Reference for costs of class scores: the cost of each sample, 0 for samples without a label."""
    pairs = zip(outputs.tolist(), labels.tolist(), strict=True)
    return torch.tensor([0.0 if label < 0 else cost(scores, label) for scores, label in pairs], dtype=torch.float64)


def log_probability(scores: list[float], label: int) -> float:
    return scores[label] - math.log(sum(math.exp(score) for score in scores))


def smoothed(scores: list[float], label: int) -> float:
    log_p = [log_probability(scores, k) for k in range(len(scores))]
    return -(0.8 * log_p[label] + 0.2 * sum(log_p) / len(scores))


def squared(scores: list[float], label: int) -> float:
    return sum((score - (k == label)) ** 2 for k, score in enumerate(scores)) / len(scores)


def hinge(scores: list[float], label: int) -> float:
    others = [max(0.0, 0.5 - scores[label] + score) for k, score in enumerate(scores) if k != label]
    return sum(others) / len(scores)


def focal(scores: list[float], label: int) -> float:
    p = math.exp(log_probability(scores, label))
    return -((1 - p) ** 1.5) * math.log(p)


@pytest.mark.parametrize(
    ("cost", "reference"),
    [
        (costs.CrossEntropy(), lambda scores, label: -log_probability(scores, label)),
        (costs.CrossEntropy(label_smoothing=0.2), smoothed),
        (costs.SquaredError(), squared),
        (costs.Hinge(margin=0.5), hinge),
        (costs.Focal(gamma=1.5), focal),
        (costs.Focal(gamma=0.0), lambda scores, label: -log_probability(scores, label)),
    ],
)
def test_costs_of_scores(cost: costs.Cost, reference: Callable[[list[float], int], float]) -> None:
    found = cost(outputs(), LABELS)
    torch.testing.assert_close(found, score_losses(outputs(), LABELS, reference))
    assert found.shape == (6,)


def test_contrastive() -> None:
    u = outputs(shape=(6, 2, 3))
    z = [row.flatten() / row.norm() for row in u]
    known = [i for i, label in enumerate(LABELS.tolist()) if label >= 0]
    reference = []
    for i in range(len(z)):
        positives = [p for p in known if p != i and LABELS[p] == LABELS[i]] if i in known else []
        total = sum(math.exp(float(z[i] @ z[a]) / 0.3) for a in known if a != i)
        log_p = [math.log(math.exp(float(z[i] @ z[p]) / 0.3) / total) for p in positives]
        reference.append(-sum(log_p) / len(log_p) if log_p else 0.0)
    found = costs.SupervisedContrastive(temperature=0.3)(u, LABELS)
    torch.testing.assert_close(found.double(), torch.tensor(reference, dtype=torch.float64), rtol=1e-6, atol=1e-6)
    assert found[2] == found[4] == 0  # the only sample with its label; no label
    assert found[0] > 0


@pytest.mark.parametrize("cost", [costs.SupervisedContrastive(), costs.Slowness()])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_products_of_activity_are_in_full_precision_under_autocast(cost: costs.Cost, dtype: torch.dtype) -> None:
    activity = outputs().float()
    expected = cost(activity, LABELS, steps=STEPS)
    with torch.autocast("cpu", dtype=dtype):
        assert torch.equal(cost(activity, LABELS, steps=STEPS), expected)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int16])
@pytest.mark.parametrize("cost", [costs.CrossEntropy(), costs.SquaredError(), costs.Hinge(), costs.Focal()])
def test_labels_may_be_any_integers(cost: costs.Cost, dtype: torch.dtype) -> None:
    assert torch.equal(cost(outputs(), LABELS.to(dtype)), cost(outputs(), LABELS))


def test_a_mixture_requires_what_its_costs_do() -> None:
    denoising = costs.Mixture({"a": costs.Sparsity(), "b": costs.Denoising()}, {"a": 1.0, "b": 1.0})
    assert denoising.output_size(10, 784) == 784
    apart = costs.Mixture({"a": costs.Denoising(readout=nn.Linear(5, 784))}, {"a": 1.0})
    assert apart.output_size(10, 784) is None


def test_denoising() -> None:
    x, y = outputs(shape=(6, 2, 2)), outputs(1)
    cost = costs.Denoising(corruption=0.5)
    reference = [sum((a - b) ** 2 for a, b in zip(r.flatten(), s, strict=True)) / 4 for r, s in zip(x, y, strict=True)]
    torch.testing.assert_close(cost(y, LABELS, inputs=x), torch.stack(reference))
    torch.manual_seed(0)
    inputs = torch.randn(100, 100)
    corrupted = cost.corrupt(inputs)
    assert 0.48 < (corrupted == 0).float().mean() < 0.52
    assert torch.equal(corrupted[corrupted != 0], inputs[corrupted != 0])
    cost.eval()
    assert torch.equal(cost.corrupt(inputs), inputs)


def test_sparsity() -> None:
    reference = [sum(abs(v) for v in row) / 4 for row in outputs().tolist()]
    torch.testing.assert_close(costs.Sparsity()(outputs()), torch.tensor(reference, dtype=torch.float64))


@pytest.mark.parametrize("decorrelation", [0.0, 2.0])
def test_slowness(decorrelation: float) -> None:
    u = outputs()  # two sequences of three steps
    size = u.shape[1]
    z = torch.empty_like(u)
    for j in range(size):
        mean = sum(u[:, j].tolist()) / 6
        variance = sum((v - mean) ** 2 for v in u[:, j].tolist()) / 6
        z[:, j] = (u[:, j] - mean) / math.sqrt(variance + 1e-6)
    pairs, total = [(0, 1), (1, 2), (3, 4), (4, 5)], 0.0
    changes = [sum(float(z[after, j] - z[before, j]) ** 2 for j in range(size)) / size for before, after in pairs]
    for i in range(size):
        for j in range(size):
            if i != j:
                total += (sum(float(z[n, i] * z[n, j]) for n in range(6)) / 6) ** 2
    found = costs.Slowness(decorrelation)(u, steps=STEPS)
    assert found.shape == (6,)
    assert float(found.mean()) == pytest.approx(sum(changes) / 4 + decorrelation * total / (size * (size - 1)))
    if not decorrelation:
        assert found[1] == pytest.approx(
            0.75 * (changes[0] + changes[1])
        )  # half of each change; 3 rows share 2 changes


def test_predictive() -> None:
    x, predictions = outputs(shape=(6, 2, 2)), outputs(1)
    found = costs.Predictive()(predictions, inputs=x, steps=STEPS)
    errors = [float((predictions[t] - x[t + 1].flatten()).square().mean()) for t in (0, 1, 3, 4)]
    assert float(found.mean()) == pytest.approx(sum(errors) / 4)
    assert found[2] == found[5] == 0
    assert found[3] == pytest.approx(1.5 * errors[2])


def test_a_mixture_is_the_weighted_sum_of_costs_each_through_its_own_readout() -> None:
    x = outputs(shape=(6, 5)).float()
    parts = {"scores": costs.CrossEntropy(readout=nn.Linear(4, 3)), "again": costs.Denoising(0.5, nn.Linear(4, 5))}
    mixture = costs.Mixture(parts, {"scores": 2.0, "again": 0.25})
    u = outputs().float()
    expected = 2 * parts["scores"](u, LABELS) + 0.25 * parts["again"](u, inputs=x)
    torch.testing.assert_close(mixture(u, LABELS, inputs=x), expected)
    assert len([*mixture.parameters()]) == 4
    assert mixture.scores
    torch.manual_seed(1)
    corrupted = mixture.corrupt(x)
    torch.manual_seed(1)
    assert torch.equal(corrupted, parts["again"].corrupt(x))
    assert not torch.equal(corrupted, x)


@pytest.mark.parametrize("name", [name for name in NAMES if name != "mixture"])
def test_gradients_are_correct_and_each_cost_can_be_pickled(name: str) -> None:
    cost = pickle.loads(pickle.dumps(build_cost(name)))
    u, x = outputs().requires_grad_(), outputs(1)
    if name == "contrastive":
        cost.temperature = 1.0
    assert torch.autograd.gradcheck(lambda u: cost(u, LABELS, inputs=x, steps=STEPS), (u,), atol=1e-4)
    losses = cost(u, LABELS, inputs=x, steps=STEPS)
    assert losses.shape == (6,)
    assert losses.isfinite().all()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: costs.CrossEntropy()(outputs()), r"CrossEntropy needs labels, but got none: call cost.outputs, l"),
        (lambda: costs.Denoising()(outputs(), LABELS), r"Denoising needs inputs, but got none: .*inputs=x"),
        (lambda: costs.Hinge()(outputs(), LABELS[:3]), r"Hinge: 6 outputs, but 3 labels"),
        (lambda: costs.Focal()(outputs(), outputs()[:, 0]), r"Focal needs class labels, N integers, not .*float64"),
        (lambda: costs.SquaredError()(outputs(), LABELS.abs()), r"labels are between 0 and 100, but .* of 4 classes"),
        (lambda: costs.CrossEntropy()(outputs(shape=(6, 2, 2)), LABELS), r"needs class scores.*readout"),
        (lambda: costs.SupervisedContrastive()(outputs(), outputs()), r"needs class labels"),
        (lambda: costs.Denoising()(outputs(), inputs=outputs(shape=(6, 9))), r"4 outputs with 9 inputs.*Linear"),
        (lambda: costs.Slowness()(outputs()), r"compares successive steps.*steps=1"),
        (lambda: costs.Predictive()(outputs(), inputs=outputs(), steps=4), r"6 rows of outputs cannot be .*steps=4"),
        (lambda: costs.CrossEntropy(label_smoothing=2), r"label_smoothing=2 must be"),
        (lambda: costs.Focal(gamma=-1), r"gamma=-1"),
        (lambda: costs.Hinge(margin=0), r"margin=0"),
        (lambda: costs.SupervisedContrastive(temperature=0), r"temperature=0"),
        (lambda: costs.Denoising(corruption=1.5), r"corruption=1.5"),
        (lambda: costs.Mixture({}, {}), r"must have the same names, at least one"),
        (lambda: costs.Mixture({"a": costs.Sparsity()}, {"b": 1.0}), r"\['a'\] and weights \['b'\]"),
        (lambda: costs.Mixture({"a": costs.Sparsity()}, {"a": -1.0}), r"weights\['a'\]=-1.0 must be"),
    ],
)  # fmt: skip
def test_arguments_that_do_not_fit_are_refused(call: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_a_subclass_may_use_the_old_names_for_one_release() -> None:
    with pytest.warns(FutureWarning) as warned:

        class Old(costs.Cost):
            told = "inputs"

            def seen(self, inputs: Tensor) -> Tensor:
                return 2 * inputs

            def wants(self, classes: int, inputs: int) -> int | None:
                return inputs + classes

            def of_each(self, outputs: Tensor, targets: Tensor | None, steps: int) -> Tensor:
                assert targets is not None
                return (outputs - targets).square().sum(1)

    expected = {f"Old.{old} is now called {new}: rename it in the class" for old, new in costs.RENAMED.items()}
    assert {str(warning.message) for warning in warned} == expected
    assert all(warning.filename == __file__ for warning in warned)
    cost, x = Old(), outputs(1)
    assert cost.target_kind == "inputs"
    assert cost.output_size(10, 4) == 14
    assert torch.equal(cost.corrupt(x), 2 * x)
    assert torch.equal(cost(outputs(), inputs=x), (outputs() - x).square().sum(1))


def test_the_old_names_of_an_instance_warn_and_work() -> None:
    cost, x = costs.Denoising(0.5), outputs()
    torch.manual_seed(0)
    with pytest.warns(FutureWarning, match=r"Denoising\.seen is now called corrupt") as warned:
        corrupted = cost.seen(x)
    assert warned[0].filename == __file__
    torch.manual_seed(0)
    assert torch.equal(corrupted, cost.corrupt(x))
    with pytest.warns(FutureWarning, match=r"Denoising\.told is now called target_kind"):
        cost.told = "nothing"
    assert cost.target_kind == "nothing"
    cost.target_kind = "labls"
    with pytest.raises(ValueError, match=r"Denoising.target_kind='labls' must be one of labels, inputs, nothing"):
        cost(x, inputs=x)


@pytest.mark.filterwarnings("ignore:.* is now called:FutureWarning")
def test_an_old_method_may_call_that_of_its_base_class() -> None:
    class Doubled(costs.Denoising):
        def of_each(self, outputs: Tensor, targets: Tensor | None, steps: int) -> Tensor:
            return 2 * super().of_each(outputs, targets, steps)

        def wants(self, classes: int, inputs: int) -> int | None:
            return 2 * super().wants(classes, inputs)

    class Again(Doubled):
        pass

    cost, x = Again(), outputs(1)
    assert cost.output_size(10, 4) == cost.wants(10, 4) == 8
    assert torch.equal(cost(outputs(), inputs=x), 2 * costs.Denoising()(outputs(), inputs=x))


def test_a_subclass_with_old_and_new_names_keeps_the_new_ones() -> None:
    class Both(costs.Cost):
        told, target_kind = "inputs", "nothing"

        def per_sample(self, outputs: Tensor, targets: Tensor | None, steps: int) -> Tensor:
            return outputs.sum(1)

    assert torch.equal(Both()(outputs()), outputs().sum(1))
