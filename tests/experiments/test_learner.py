"""`Learner`: its steps equal a plain training loop, and its errors name the cause."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import bioopt
from bioopt.costs import CrossEntropy, SupervisedContrastive
from experiments import building, data
from experiments.learner import Block, Learner

from ..commands import config


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Dropout(0.5), nn.Linear(8, 3))


def batches(count: int = 5) -> Iterator[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    for _ in range(count):
        yield torch.randn(4, 6, generator=generator), torch.randint(3, (4,), generator=generator)


def learner(model: nn.Module, optimizer: torch.optim.Optimizer, **options: object) -> Learner:
    block = Block(model, CrossEntropy(), optimizer, clip_norm=options.pop("clip_norm", None))
    return Learner(model, [block], name="it", rate="lr=1", **options)


@pytest.mark.parametrize("clip_norm", [None, 0.1])
def test_fit_is_the_plain_loop_with_a_schedule(clip_norm: float | None) -> None:
    model = network()
    twin = copy.deepcopy(model)
    optimizer, other = (torch.optim.SGD(m.parameters(), lr=0.3, momentum=0.9) for m in (model, twin))
    fitted = learner(model, optimizer, clip_norm=clip_norm)
    fitted.last.scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2)
    schedule = torch.optim.lr_scheduler.StepLR(other, 2)
    model.eval()
    torch.manual_seed(3)
    losses = fitted.fit(batches())
    torch.manual_seed(3)
    for (inputs, labels), found in zip(batches(), losses, strict=True):
        other.zero_grad()
        loss = F.cross_entropy(twin(inputs), labels, reduction="none").mean()
        loss.backward()
        if clip_norm is not None:
            nn.utils.clip_grad_norm_(twin.parameters(), clip_norm)
        other.step()
        schedule.step()
        assert torch.equal(found, loss.detach().view(1))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), twin.parameters(), strict=True))


def test_fit_ends_at_the_criterion_and_trains_in_training_mode() -> None:
    model, modes = network(), []
    fitted = learner(model, torch.optim.SGD(model.parameters(), lr=0.1))
    model[2].register_forward_pre_hook(lambda module, args: modes.append(module.training))

    def until() -> bool:
        fitted.predict(batches(1))
        return len(modes) == 6

    assert len(fitted.fit(batches(), until)) == 3
    assert modes == [True, False] * 3


def test_predictions_and_evaluation_average_views_and_batches() -> None:
    model = network()
    fitted = learner(model, torch.optim.SGD(model.parameters(), lr=0.1))
    views = [(torch.cat([x, x + 1]), y) for x, y in batches(3)]
    outputs, labels = fitted.predict(views)
    model.eval()
    with torch.no_grad():
        expected = torch.cat([(model(x[:4]) + model(x[4:])) / 2 for x, _ in views])
    torch.testing.assert_close(outputs, expected)
    assert torch.equal(labels, torch.cat([y for _, y in views]))
    loss, accuracy = fitted.evaluate(views)
    assert loss == pytest.approx(float(F.cross_entropy(expected, labels)), rel=1e-5)
    assert accuracy == pytest.approx(float((expected.argmax(1) == labels).double().mean()))


def test_evaluation_is_by_the_prediction_of_a_rule_that_has_one() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
    rule = bioopt.ForwardForward(model, prediction="goodness")
    fitted = learner(model, rule)
    fitted.fit(batches())
    outputs, labels = fitted.predict(batches(3))
    assert torch.equal(outputs, torch.cat([rule.predict(x) for x, _ in batches(3)]))
    assert fitted.evaluate(batches(3))[1] == pytest.approx(float((outputs.argmax(1) == labels).double().mean()))
    assert not torch.allclose(outputs, model(torch.cat([x for x, _ in batches(3)])))


def two_blocks(lr: float = 0.1) -> Learner:
    model = network()
    parts = {"trunk": (model[:3], SupervisedContrastive()), "head": (model[3:], CrossEntropy())}
    blocks = [
        Block(m, cost, bioopt.NodePerturbation(m, lr=lr, sigma=0.01, seed=0), name=n) for n, (m, cost) in parts.items()
    ]
    return Learner(model, blocks, name="it", rate="lr=1")


def test_a_state_restores_blocks_bit_for_bit() -> None:
    first, second = two_blocks(), two_blocks()
    first.fit(batches(3))
    second.network.load_state_dict(first.network.state_dict())
    second.load_state_dict(copy.deepcopy(first.state_dict()))  # torch shares the tensors of Adam's state
    for each in (first, second):
        torch.manual_seed(5)
        each.fit(batches())
        each.close()
    pairs = zip(first.network.parameters(), second.network.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    assert first.forward_passes == first.last.optimizer.forward_passes + 1
    assert set(first.coverage().values()) == {"NodePerturbation, trunk", "NodePerturbation, head"}


@pytest.mark.parametrize("check", [True, False])
def test_a_loss_that_is_not_finite_is_an_error_that_names_it(check: bool) -> None:
    model = network()
    fitted = learner(model, torch.optim.SGD(model.parameters(), lr=1e38), check=check)
    fitted.moment = "epoch 2"
    if check:
        with pytest.raises(bioopt.Diverged, match=r"^it: the loss is (inf|nan) in epoch 2 with lr=1; lower it$"):
            fitted.fit(batches())
        return
    losses = fitted.fit(batches())
    assert len(losses) == 5
    with pytest.raises(bioopt.Diverged, match="it: the loss is nan"):
        fitted.check_losses(losses[-1].tolist())


def test_an_error_in_a_step_names_the_block_and_the_rate_and_keeps_its_type() -> None:
    fitted = two_blocks(lr=1e30)
    fitted.moment = "epoch 2"
    with pytest.raises(bioopt.Diverged, match=r"^block (trunk|head): .* \(epoch 2, lr=1\)$"):
        fitted.fit(batches(20))
    fitted.close()


@pytest.mark.parametrize(("optimizer", "rate"), [("sgd", "0.02"), ("predictive_coding", "0.001")])
def test_messages_have_the_rate_that_is_used_where_none_is_given(optimizer: str, rate: str) -> None:
    chosen = config("data=digits", "model=mlp", "model.hidden=[4]", f"optimizer={optimizer}")
    model = building.build_model(chosen, data.load("digits", ""))
    learner = building.build_learner(chosen, model, "it", "optimizer")
    assert learner.rate == f"optimizer.lr={rate}"
    learner.close()
