"""Classic results of single rules: what is measured can fail, and succeeds where the rule learns."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import bioopt
from experiments.run import run
from experiments.tasks import classics
from experiments.tasks.classics import Bars, Classics, Components, Foldiak, Inhibited, OrderedComponents, Patterns

from ..commands import config
from .test_tasks import interrupted, resumed

SMALL = [
    "experiment=classics", "logger.mode=disabled", "task.patch_size=6",
    "task.oja.patches=500", "task.oja.batch_size=100",
    "task.sanger={neurons: 2, lr: 10.0, patches: 500, epochs: 10, batch_size: 100}",
    "task.bcm_patterns={patterns: 3, inputs: 6, lr: 0.2, threshold_rate: 0.2, steps: 400, batch_size: 10}",
    "task.bcm_orientations={neurons: 3, components: 20, lr: 0.03, threshold_rate: 0.1, patches: 500, epochs: 1, "
    "batch_size: 100}",
    "task.bars={size: 3, probability: 0.2, presentations: 40, settling: 5, lr: 0.02, lateral_lr: 0.1, "
    "threshold_lr: 0.02}",
]  # fmt: skip
CPU = torch.device("cpu")


def correlated(count: int) -> Tensor:
    """Patches of 4×4 pixels whose components have clearly different variances."""
    generator = torch.Generator().manual_seed(0)
    axes = torch.linalg.qr(torch.randn(16, 16, generator=generator)).Q
    return torch.randn(count, 16, generator=generator) * 0.7 ** torch.arange(16) @ axes


@pytest.mark.long
def test_the_experiment_has_a_page_and_resumes_bit_for_bit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = run(config(*SMALL, f"run_dir={tmp_path / 'whole'}"))
    found = whole["measured"]
    assert next(iter(found)) == "oja_least_cosine"
    assert found["oja_least_cosine"] > 0.99 > 0.9 > found["oja_least_cosine_before"]
    assert found["bcm_patterns_selectivity"] > found["bcm_patterns_selectivity_before"]
    assert found["bars_of"] == 6
    assert 0 < (tmp_path / "whole" / "classics.png").stat().st_size < 300_000
    interrupted(monkeypatch, Classics, 4, *SMALL, f"run_dir={tmp_path / 'part'}")
    assert resumed(monkeypatch, tmp_path / "part")["measured"] == found


@pytest.mark.long
def test_a_part_is_the_same_without_the_others(tmp_path: Path) -> None:
    alone = run(config(*SMALL, "task.parts=[bcm_patterns]", f"run_dir={tmp_path / 'alone'}"))["measured"]
    after = run(config(*SMALL, "task.parts=[oja,bcm_patterns]", f"run_dir={tmp_path / 'after'}"))["measured"]
    assert alone == {name: value for name, value in after.items() if name.startswith("bcm_patterns")}


def test_patches_of_the_data(tmp_path: Path) -> None:
    options = [*SMALL, "task.parts=[oja]", "task.source=data", "data=digits"]
    found = run(config(*options, f"run_dir={tmp_path / 'run'}"))["measured"]
    assert found["oja_least_cosine"] > 0.99


def test_components_are_measured_against_the_right_eigenvectors() -> None:
    torch.manual_seed(0)
    options = {"neurons": 3, "lr": 10.0, "patches": 2000, "batch_size": 500}
    of_oja, drawn = Components(**options, epochs=20).run(correlated, 4, CPU)
    assert of_oja["least_cosine"] > 0.99
    first = drawn["eigenvectors"]
    torch.testing.assert_close(first, first[:1].expand_as(first))
    of_sanger, drawn = OrderedComponents(**options, epochs=20).run(correlated, 4, CPU)
    assert of_sanger["least_cosine"] > 0.99
    torch.testing.assert_close(drawn["eigenvectors"] @ drawn["eigenvectors"].T, torch.eye(3), atol=1e-4, rtol=0)
    assert (drawn["share"].diff() < 0).all()
    early, _ = OrderedComponents(neurons=3, lr=0.01, patches=2000, batch_size=2000, epochs=1).run(correlated, 4, CPU)
    assert early["least_cosine"] < 0.9  # a rule that has not converged is seen


def test_selectivity() -> None:
    assert classics.selectivity(torch.tensor([2.0, 0.0, -1.0, 0.0])) == 0.75
    assert classics.selectivity(torch.full((4,), 3.0)) == 0
    torch.manual_seed(0)
    options = {"patterns": 4, "inputs": 9, "threshold_rate": 0.2, "batch_size": 10}
    learned, _ = Patterns(**options, lr=0.2, steps=1500).run(correlated, 4, CPU)
    assert learned["selectivity"] > 0.95 * learned["selectivity_at_most"]
    unlearned, _ = Patterns(**options, lr=1e-6, steps=50).run(correlated, 4, CPU)
    assert unlearned["selectivity"] < 0.4
    assert math.isclose(unlearned["selectivity"], unlearned["selectivity_before"], abs_tol=1e-3)


def test_the_orientation_index_of_gabors_and_of_round_fields() -> None:
    size, gratings = 12, classics.all_gratings(12)
    y, x = torch.meshgrid(torch.arange(size) - 5.5, torch.arange(size) - 5.5, indexing="ij")
    round_, degrees = (-(x**2 + y**2) / 8).exp(), torch.tensor([0.0, 60.0, 90.0])
    along = [x * math.cos(a) + y * math.sin(a) for a in degrees.deg2rad().tolist()]
    gabors = torch.stack([round_ * torch.cos(2 * math.pi * 3 / size * u) for u in along]).flatten(1)
    tuned = classics.tuning(gratings, gabors)
    best = tuned.argmax(1) * 180 / tuned.shape[1]
    torch.testing.assert_close(best, degrees)
    assert (classics.orientation_index(tuned) > 0.6).all()
    spot = round_ - 0.25 * (-(x**2 + y**2) / 32).exp()
    assert classics.orientation_index(classics.tuning(gratings, spot.flatten()[None])) < 0.1
    one, all_ = torch.eye(8)[:1], torch.ones(1, 8)
    torch.testing.assert_close(classics.orientation_index(torch.cat([one, all_])), torch.tensor([1.0, 0.0]))


def test_bars_are_found_by_neurons_that_stand_for_one() -> None:
    assert classics.found(torch.eye(4)) == 4
    assert classics.found(torch.ones(4, 4)) == 0
    assert classics.found(torch.zeros(4, 4)) == 0
    assert classics.found(-torch.eye(4)) == 0
    assert classics.found(torch.eye(4)[:, [0, 0, 1, 2]]) == 3  # two neurons for one bar
    assert classics.found(torch.tensor([[1.0], [0.6], [0.0]])) == 0  # a neuron for two
    single = classics.single_bars(3)
    assert single.view(6, 3, 3)[1].tolist() == [[0, 0, 0], [1, 1, 1], [0, 0, 0]]
    assert single.view(6, 3, 3)[5].tolist() == [[0, 0, 1]] * 3
    torch.manual_seed(0)
    part = Bars(8, 0.125, 1, 1, 0.1, 0.1, 0.1)
    images = part.images(4000, CPU)
    assert set(images.unique().tolist()) == {0.0, 1.0}
    assert abs(images.mean().item() - (1 - 0.875**2)) < 0.02


def foldiak(steps: int, seed: int = 0) -> tuple[Inhibited, float]:
    torch.manual_seed(seed)
    part = Bars(4, 0.25, 1, 1, 0.02, 0.1, 0.02)
    network = Inhibited(16, 8)
    rule = Foldiak(network, 0.02, lateral_lr=0.1, threshold_lr=0.02, active=0.25)
    classics.learn(rule, network, (part.images(4, CPU) for _ in range(steps)))
    rule.close()
    return network, network(part.images(1000, CPU)).mean().item()


def test_foldiaks_network_finds_bars_that_it_does_not_start_with() -> None:
    single = classics.single_bars(4)
    network, activity = foldiak(600)
    assert classics.found(network(single).detach()) >= 7
    assert abs(activity - 0.25) < 0.04
    start, _ = foldiak(0)
    assert classics.found(start(single).detach()) <= 2


def test_foldiaks_rule_is_that_of_the_paper() -> None:
    torch.manual_seed(0)
    network, x = Inhibited(6, 4), (torch.rand(3, 6) < 0.5).float()
    with torch.no_grad():
        network.lateral.uniform_(-0.5, 0).fill_diagonal_(0)
        network.threshold.uniform_(0, 0.8)
    w, lateral, threshold = (p.detach().clone() for p in (network.weight, network.lateral, network.threshold))
    rule = Foldiak(network, 0.03, lateral_lr=0.2, threshold_lr=0.05, active=0.25)
    y = network(x).detach()
    assert 0 < y.mean() < 1
    rule.step()
    rule.close()
    for k in range(4):
        expected = sum(y[n, k] * (x[n] - w[k]) for n in range(3)) / 3
        torch.testing.assert_close(network.weight[k].detach() - w[k], 0.03 * expected)
        torch.testing.assert_close(network.threshold[k].detach() - threshold[k], 0.05 * (y[:, k].mean() - 0.25))
        for i in range(4):
            moved = lateral[k, i] - 0.2 * ((y[:, k] * y[:, i]).mean() - 0.25**2)
            torch.testing.assert_close(
                network.lateral[k, i].detach(), moved.clamp(max=0) if i != k else torch.tensor(0.0)
            )


def test_inhibited_neurons_settle_where_they_inhibit_each_other() -> None:
    network = Inhibited(2, 2)
    with torch.no_grad():
        network.weight.copy_(torch.tensor([[1.0, 0.0], [0.8, 0.0]]))
        network.threshold.fill_(0.5)
    x = torch.tensor([[1.0, 0.0]])
    assert network(x).tolist() == [[1, 1]]
    with torch.no_grad():
        network.lateral.copy_(torch.tensor([[0.0, -1.0], [-1.0, 0.0]]))
    assert network(x).tolist() == [[1, 0]]
    assert network(0 * x).tolist() == [[0, 0]]


@pytest.mark.parametrize("layer", [classics.Rectified(5, 3, bias=False), Inhibited(5, 3)])
def test_the_local_product_is_of_the_input_whatever_the_neurons_do(layer: nn.Linear) -> None:
    """The activity of neurons is a value; the derivative is that of ``W x``, also where a neuron is silent."""
    seen = []

    class Watched(bioopt.LocalProductRule):
        def signal(self, u, synapse, group):
            seen.append(u.clone())
            return torch.ones_like(u)

        def update(self, product, signal, synapse, group):
            seen.append(product.clone())
            return torch.zeros_like(product)

    x = torch.randn(7, 5)
    rule = Watched(layer, lr=1.0, readout=None)
    y = layer(x)
    rule.step()
    rule.close()
    torch.testing.assert_close(seen[0], y)
    torch.testing.assert_close(seen[1], x.mean(0).expand(3, 5))
    if isinstance(layer, classics.Rectified):
        torch.testing.assert_close(y, F.relu(F.linear(x, layer.weight)))


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("task.parts=[]", r"task\.parts=\[\] must be a list of some of oja"),
        ("task.parts=[oja,oja]", r"task\.parts=\['oja', 'oja'\] must be .*, each once"),
        ("task.source=photos", r"task\.source=photos must be photographs or data"),
        ("task.patch_size=3", r"task\.patch_size=3 must be an integer >= 4"),
        ("task.patch_size=500", r"task\.patch_size=500 is larger than a photograph"),
        ("task.oja.neurons=0", r"task\.oja: neurons=0 must be an integer >= 1"),
        ("task.sanger.lr=-1", r"task\.sanger: lr=-1 must be a number > 0"),
        ("task.bcm_patterns.patterns=7", r"task\.bcm_patterns: patterns=7 must be at least 2, and at most inputs=6"),
        ("task.bcm_orientations.components=36", r"bcm_orientations: components=36 must be below the 36 pixels"),
        ("task.bars.probability=1.5", r"task\.bars: probability=1\.5 must be below 1"),
    ],
)
def test_invalid_options_are_refused(option: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"experiment=classics: .*{message}|^.*{message}"):
        run(config(*SMALL, option, f"run_dir={tmp_path / 'run'}"))


@pytest.mark.slow
def test_all_classic_results_are_reached(tmp_path: Path) -> None:
    found = run(config("experiment=classics", "seed=5", "logger.mode=disabled", f"run_dir={tmp_path}/run"))["measured"]
    assert found["oja_least_cosine"] > 0.999
    assert found["sanger_least_cosine"] > 0.99
    assert found["bcm_patterns_selectivity"] > 0.85
    assert found["bcm_orientations_index"] > 2 * found["bcm_orientations_index_of_noise"]
    assert found["bars_found"] == 16 > found["bars_found_by_hebbian"]
