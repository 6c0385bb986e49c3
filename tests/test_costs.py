"""Costs: each against a slow twin, with every rule; areas, which learn from a cost of their own and nothing else."""

from __future__ import annotations

import json
import math
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import DictConfig
from torch import Tensor, nn

from bioopt import costs
from experiments import building, data, training
from experiments.areas import build_areas, stretched
from experiments.building import build_cost
from experiments.training import run

from .commands import ROOT
from .test_diagnostics import equal_state
from .test_train import OPTIMIZERS, TINY, config, tiny

NAMES = sorted(path.stem for path in (ROOT / "conf/cost").glob("*.yaml"))
LABELS = torch.tensor([0, 2, 1, 2, costs.UNLABELLED, 0])
STEPS = 3


def outputs(seed: int = 0, shape: tuple[int, ...] = (6, 4)) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def one_by_one(outputs: Tensor, labels: Tensor, of: Callable[[list[float], int], float]) -> Tensor:
    """A twin of costs of scores: nothing for who has no label."""
    pairs = zip(outputs.tolist(), labels.tolist(), strict=True)
    return torch.tensor([0.0 if label < 0 else of(scores, label) for scores, label in pairs], dtype=torch.float64)


def log_share(scores: list[float], label: int) -> float:
    return scores[label] - math.log(sum(math.exp(score) for score in scores))


def smoothed(scores: list[float], label: int) -> float:
    everything = [log_share(scores, k) for k in range(len(scores))]
    return -(0.8 * everything[label] + 0.2 * sum(everything) / len(scores))


def squared(scores: list[float], label: int) -> float:
    return sum((score - (k == label)) ** 2 for k, score in enumerate(scores)) / len(scores)


def hinge(scores: list[float], label: int) -> float:
    others = [max(0.0, 0.5 - scores[label] + score) for k, score in enumerate(scores) if k != label]
    return sum(others) / len(scores)


def focal(scores: list[float], label: int) -> float:
    share = math.exp(log_share(scores, label))
    return -((1 - share) ** 1.5) * math.log(share)


@pytest.mark.parametrize(
    ("cost", "twin"),
    [
        (costs.CrossEntropy(), lambda scores, label: -log_share(scores, label)),
        (costs.CrossEntropy(label_smoothing=0.2), smoothed),
        (costs.SquaredError(), squared),
        (costs.Hinge(margin=0.5), hinge),
        (costs.Focal(gamma=1.5), focal),
        (costs.Focal(gamma=0.0), lambda scores, label: -log_share(scores, label)),
    ],
)
def test_costs_of_scores(cost: costs.Cost, twin: Callable[[list[float], int], float]) -> None:
    found = cost(outputs(), LABELS)
    torch.testing.assert_close(found, one_by_one(outputs(), LABELS, twin))
    assert found.shape == (6,)


def test_contrastive() -> None:
    u = outputs(shape=(6, 2, 3))
    z = [row.flatten() / row.norm() for row in u]
    known = [i for i, label in enumerate(LABELS.tolist()) if label >= 0]
    twin = []
    for i in range(len(z)):
        alike = [p for p in known if p != i and LABELS[p] == LABELS[i]] if i in known else []
        whole = sum(math.exp(float(z[i] @ z[a]) / 0.3) for a in known if a != i)
        shares = [math.log(math.exp(float(z[i] @ z[p]) / 0.3) / whole) for p in alike]
        twin.append(-sum(shares) / len(shares) if shares else 0.0)
    found = costs.SupervisedContrastive(temperature=0.3)(u, LABELS)
    torch.testing.assert_close(found.double(), torch.tensor(twin, dtype=torch.float64), rtol=1e-6, atol=1e-6)
    assert found[2] == found[4] == 0  # alone with its label; without one
    assert found[0] > 0


def test_denoising() -> None:
    x, y = outputs(shape=(6, 2, 2)), outputs(1)
    cost = costs.Denoising(corruption=0.5)
    twin = [sum((a - b) ** 2 for a, b in zip(r.flatten(), s, strict=True)) / 4 for r, s in zip(x, y, strict=True)]
    torch.testing.assert_close(cost(y, LABELS, inputs=x), torch.stack(twin))
    torch.manual_seed(0)
    many = torch.randn(100, 100)
    seen = cost.seen(many)
    assert 0.48 < (seen == 0).float().mean() < 0.52
    assert torch.equal(seen[seen != 0], many[seen != 0])
    cost.eval()
    assert torch.equal(cost.seen(many), many)


def test_sparsity() -> None:
    twin = [sum(abs(v) for v in row) / 4 for row in outputs().tolist()]
    torch.testing.assert_close(costs.Sparsity()(outputs()), torch.tensor(twin, dtype=torch.float64))


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
        assert found[1] == pytest.approx(0.75 * (changes[0] + changes[1]))  # half of each, of 3 rows for 2 changes


def test_predictive() -> None:
    x, said = outputs(shape=(6, 2, 2)), outputs(1)
    found = costs.Predictive()(said, inputs=x, steps=STEPS)
    errors = [float((said[t] - x[t + 1].flatten()).square().mean()) for t in (0, 1, 3, 4)]
    assert float(found.mean()) == pytest.approx(sum(errors) / 4)
    assert found[2] == found[5] == 0
    assert found[3] == pytest.approx(1.5 * errors[2])


def test_a_mixture_is_the_weighted_sum_each_through_its_own_readout() -> None:
    x = outputs(shape=(6, 5)).float()
    parts = {"scores": costs.CrossEntropy(readout=nn.Linear(4, 3)), "again": costs.Denoising(0.5, nn.Linear(4, 5))}
    mixture = costs.Mixture(parts, {"scores": 2.0, "again": 0.25})
    u = outputs().float()
    separate = 2 * parts["scores"](u, LABELS) + 0.25 * parts["again"](u, inputs=x)
    torch.testing.assert_close(mixture(u, LABELS, inputs=x), separate)
    assert len([*mixture.parameters()]) == 4
    assert mixture.scores
    torch.manual_seed(1)
    seen = mixture.seen(x)
    torch.manual_seed(1)
    assert torch.equal(seen, parts["again"].seen(x))
    assert not torch.equal(seen, x)


@pytest.mark.parametrize("name", [name for name in NAMES if name != "mixture"])
def test_gradients_are_right_and_each_cost_can_be_copied(name: str) -> None:
    cost = pickle.loads(pickle.dumps(build_cost(name)))
    u, x = outputs().requires_grad_(), outputs(1)
    if name == "contrastive":
        cost.temperature = 1.0
    assert torch.autograd.gradcheck(lambda u: cost(u, LABELS, inputs=x, steps=STEPS), (u,), atol=1e-4)
    losses = cost(u, LABELS, inputs=x, steps=STEPS)
    assert losses.shape == (6,)
    assert losses.isfinite().all()


@pytest.mark.parametrize(
    ("broken", "says"),
    [
        (lambda: costs.CrossEntropy()(outputs()), r"CrossEntropy is told labels, and got none"),
        (lambda: costs.Denoising()(outputs(), LABELS), r"Denoising is told inputs, and got none: .*inputs=x"),
        (lambda: costs.Hinge()(outputs(), LABELS[:3]), r"Hinge: 6 outputs, but 3 labels"),
        (lambda: costs.Focal()(outputs(), outputs()[:, 0]), r"Focal is told class labels, N integers, not .*float64"),
        (lambda: costs.SquaredError()(outputs(), LABELS.abs()), r"labels from 0 to 100, but scores of 4 classes"),
        (lambda: costs.CrossEntropy()(outputs(shape=(6, 2, 2)), LABELS), r"wants class scores.*readout"),
        (lambda: costs.SupervisedContrastive()(outputs(), outputs()), r"is told class labels"),
        (lambda: costs.Denoising()(outputs(), inputs=outputs(shape=(6, 9))), r"4 outputs with 9 inputs.*Linear"),
        (lambda: costs.Slowness()(outputs()), r"compares successive steps.*steps=1"),
        (lambda: costs.Predictive()(outputs(), inputs=outputs(), steps=4), r"6 rows of outputs with steps=4"),
        (lambda: costs.CrossEntropy(label_smoothing=2), r"label_smoothing=2 must be"),
        (lambda: costs.Focal(gamma=-1), r"gamma=-1"),
        (lambda: costs.Hinge(margin=0), r"margin=0"),
        (lambda: costs.SupervisedContrastive(temperature=0), r"temperature=0"),
        (lambda: costs.Denoising(corruption=1.5), r"corruption=1.5"),
        (lambda: costs.Mixture({}, {}), r"must have the same names, >= 1"),
        (lambda: costs.Mixture({"a": costs.Sparsity()}, {"b": 1.0}), r"\['a'\] and weights \['b'\]"),
        (lambda: costs.Mixture({"a": costs.Sparsity()}, {"a": -1.0}), r"weights\['a'\]=-1.0 must be"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_told(broken: Callable[[], object], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        broken()


# -- areas --------------------------------------------------------------------------------------------------------

IMAGES = data.load("digits", "")


def one_step(run: DictConfig, **cost: Any) -> tuple[list[Any], list[bool]]:
    """The areas after a step of each, and whether it has changed them."""
    run = run.copy()
    run.cost = {"name": "cross_entropy", "areas": None, **cost}
    torch.manual_seed(0)
    model = building.build_model(run, IMAGES)
    areas = build_areas(run, model, IMAGES)
    augment = data.Augment(**run.data.augment)
    inputs, labels = next(IMAGES.training_batches(8, 0, 0, augment))
    changed = []
    for area in areas:
        area.train()
        learns = [*area.network.parameters(), *area.cost.parameters()]
        before = [p.detach().clone() for p in learns]
        losses: Any = area.optimizer.step(area.closure(inputs, labels, steps=augment.frames))
        assert losses.shape == (8 * augment.frames,)
        assert losses.isfinite().all()
        changed.append(any(not torch.equal(a, b) for a, b in zip(before, learns, strict=True)))
        inputs = area.says(inputs)
    return areas, changed


SOME = [name for name in NAMES if name not in ("mixture", "cross_entropy")]
ALL_COSTS = ("hebbian", "node_perturbation", "sgd")  # one of each kind of optimizer; the others take turns


@pytest.mark.parametrize("rule", [o for o in OPTIMIZERS if o != "hill_climbing"])  # which may keep nothing
@pytest.mark.filterwarnings("ignore:ForwardGradient. no forward derivative")
@pytest.mark.filterwarnings("ignore:.*did not fire")
def test_every_optimizer_learns_from_every_cost_that_fits(rule: str) -> None:
    run = config(*tiny(rule), "data.augment.crop=2")
    for cost in SOME if rule in ALL_COSTS else SOME[OPTIMIZERS.index(rule) % 3 :: 3]:
        if build_cost(cost).scores:
            assert one_step(run, name=cost)[1] == [True], cost
            continue
        run.data.augment.frames = 2 if build_cost(cost).sequences else 1
        areas = {"trunk": cost, "head": "cross_entropy"}
        if rule in ("random_trunk", "reward_stdp"):  # the second's network has no readout that would be a head
            with pytest.raises(
                ValueError, match=r"random_trunk freezes the trunk|a trunk and a head .* are of a model"
            ):
                one_step(run, areas=areas)
        else:
            assert one_step(run, areas=areas)[1] == [True, True], cost


def test_no_error_passes_between_areas() -> None:
    """An area learns what it learns alone: whatever the head's cost, and with whatever rule."""
    trunks = []
    for head in ("cross_entropy", "hinge"):
        areas, _ = one_step(config(*tiny("node_perturbation")), areas={"trunk": "contrastive", "head": head})
        trunks.append([*areas[0].network.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*trunks, strict=True))


def test_a_trunk_learns_what_its_cost_alone_would_teach_it() -> None:
    areas, _ = one_step(config(*tiny("sgd")), areas={"trunk": "contrastive", "head": "cross_entropy"})
    run = config("optimizer=sgd", *TINY)
    torch.manual_seed(0)
    model = building.build_model(run, IMAGES)
    inputs, labels = next(IMAGES.training_batches(8, 0, 0, data.Augment(**run.data.augment)))
    trunk, head = model[:-1], model[-1]
    costs.SupervisedContrastive()(trunk(inputs), labels).mean().backward()
    with torch.no_grad():
        for p in trunk.parameters():
            p -= run.optimizer.lr * p.grad
    for twin, found in zip(trunk.parameters(), areas[0].network.parameters(), strict=True):
        torch.testing.assert_close(found, twin)
    trunk.eval()
    costs.CrossEntropy()(head(trunk(inputs).detach()), labels).mean().backward()
    with torch.no_grad():
        head.weight -= run.optimizer.lr * head.weight.grad
    torch.testing.assert_close(areas[1].network[0].weight, head.weight)


def test_areas_go_from_one_name_to_the_next() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 2))
    cut = stretched(model, ["head", "3", "1"])
    assert {name: [*dict(part.named_children())] for name, part in cut.items()} == {
        "1": ["0", "1", "2"],  # what comes before and has no weights goes with it
        "3": ["3", "4"],
        "head": ["5"],
    }
    assert cut["head"][0] is model[5]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["cost.areas={trunk: contrastive, brain: hinge}"], r"'brain', which is not an area of the model; there are"),
        (["cost.areas={trunk: contrastive, 4: hinge, head: hinge}"], r"'trunk' and '4' overlap"),
        (["cost.areas={0: contrastive, trunk: contrastive, head: hinge}"], r"overlap"),
        (["cost.areas={head: hinge, 9: hinge}"], r"'head' and '9' overlap"),
        (["cost.areas={trunk: hinge}"], r"nothing tells the head what to learn"),
        (["cost.areas={head: hinge}"], r"'0' is in no area and would not learn"),
        (["cost.areas={trunk: hinge, head: contrastive}"], r"cost.areas.head=contrastive makes no class scores"),
        (["cost.areas={trunk: wishes, head: hinge}"], r"cost.areas.trunk=wishes is not a cost.*squared_error"),
        (["cost.areas={trunk: {name: focal, gama: 1}, head: hinge}"], r"cost.areas.trunk=focal: .*gama"),
        (["cost.areas={trunk: {name: focal, gamma: -1}, head: hinge}"], r"cost.areas.trunk=focal: .*gamma=-1"),
        (["cost.areas={trunk: {name: mixture}, head: hinge}"], r"cost.areas.trunk.weights=None must say how much"),
        (["cost=mixture", "cost.weights={wishes: 1}"], r"cost.weights=wishes is not a cost"),
        (["cost=mixture", "cost.weights={hinge: 1, denoising: 1}"], r"denoising cannot be of the network's outputs"),
        (["cost=denoising"], r"cost=denoising makes no class scores.*cost.areas='\{trunk: denoising"),
        (["cost=sparsity"], r"cost=sparsity makes no class scores"),
        (["cost.areas={trunk: slowness, head: hinge}"], r"data.augment.frames=1 gives single ones"),
        (["data.augment.frames=4", "data.augment.crop=0"], r"nowhere to move"),
        (["cost.areas={trunk: hinge, head: hinge}", "diagnostics.every=2"], r"diagnostics.every=2 compares"),
        (["cost.areas={trunk: hinge, head: hinge}", "optimizer=random_trunk"], r"leave cost.areas out"),
    ],
)
def test_areas_that_cannot_be_are_told(options: list[str], says: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=says):
        run(config("optimizer=sgd", *TINY, f"run_dir={tmp_path}/run", *options))


@pytest.mark.usefixtures("undrawn")
def test_one_area_after_another_says_what_trains_what(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["optimizer=node_perturbation", *TINY, "cost.areas={trunk: denoising, head: {name: hinge, margin: 2}}"]
    summary = run(config(*options, "optimizer.samples=2", "epochs=2", "plastic_epochs=1", f"run_dir={tmp_path}/run"))
    told = capsys.readouterr().out
    assert "NodePerturbation, trunk" in told
    assert "cost of trunk: readout.weight" in told
    assert "Adam on the frozen trunk" in told
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert lines[0]["train_loss_trunk"] > 0
    assert "train_loss_trunk" not in lines[1]
    assert summary["forward_passes"] == 5 * 4 + 2 + 22  # of a step 3, and one for the head; two looks; features


@pytest.mark.usefixtures("undrawn")
def test_an_interrupted_run_in_areas_goes_on_bit_for_bit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    areas = "cost.areas={trunk: {name: mixture, weights: {denoising: 1, contrastive: 0.1}}, head: focal}"
    options = ["optimizer=sgd", *TINY, areas, "epochs=3", "data.augment.crop=1"]
    run(config(*options, f"run_dir={tmp_path}/whole"))
    evaluate, seen = training.evaluate, []

    def interrupted(*given: Any) -> tuple[float, float]:
        seen.append(given)
        if len(seen) == 2:
            raise KeyboardInterrupt
        return evaluate(*given)

    with monkeypatch.context() as patch:
        patch.setattr(training, "evaluate", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run(config(*options, f"run_dir={tmp_path}/cut"))
    run(config(f"resume={tmp_path}/cut"))
    whole, cut = (torch.load(tmp_path / name / "checkpoint.pt", weights_only=True) for name in ("whole", "cut"))
    assert len(whole["areas"][0]["cost"]) == 2  # the decoder
    for key in ("model", "areas", "random", "forward_passes", "steps"):
        assert equal_state(whole[key], cut[key]), key
