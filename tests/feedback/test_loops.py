"""The feedback rules in any loop and network: accumulation, clipping, `Mixed`, checkpointing, shared layers, Muon."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import bioopt

from ..core import test_acts as acts
from ..rules import batch, cnn, ordinary, same, weights

RULES: list[Any] = [
    bioopt.FeedbackAlignment,
    bioopt.SignSymmetry,
    bioopt.KolenPollack,
    bioopt.WeightMirror,
    bioopt.DirectFeedbackAlignment,
    bioopt.DRTP,
    bioopt.DirectKolenPollack,
]
every_rule = pytest.mark.parametrize("rule", RULES)
SGD: dict[str, Any] = {"descent": torch.optim.SGD}


def network(sizes: tuple[int, ...] = (128, 12, 5), bias: bool = True) -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        layers: list[nn.Module] = [nn.Flatten()]
        for a, b in pairwise(sizes):
            layers += [nn.Linear(a, b, bias=bias), nn.Tanh()]
        return nn.Sequential(*layers[:-1]).double()


def halves(x: Tensor, y: Tensor, parts: int) -> list[tuple[Tensor, Tensor]]:
    return list(zip(x.double().chunk(parts), y.chunk(parts), strict=True))


@every_rule
def test_accumulated_gradients_are_those_of_the_whole_batch(rule: Any) -> None:
    results, learned = [], []
    for parts in (1, 2):
        model = network((128, 12, 10, 5))
        optimizer = rule(model, 0.1, **SGD)
        for i in range(2):
            optimizer.zero_grad()
            for x, y in halves(*batch(i), parts):
                optimizer.target = y
                (F.cross_entropy(model(x), y) / (1 if rule is bioopt.DRTP else parts)).backward()
            if rule is bioopt.DRTP:  # whose signal is the mean over each forward pass, whatever the loss
                for p in model.parameters():
                    p.grad /= parts
            optimizer.step()
        results.append(weights(model))
        learned.append(list(optimizer.feedback_weights().values()))
    for a, b in zip(results[0] + learned[0], results[1] + learned[1], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


@every_rule
def test_gradients_can_be_clipped_before_the_descent(rule: Any) -> None:
    model = network()
    optimizer, before = rule(model, 1.0, centre_inputs=False, **SGD), weights(model)
    ((x, y),) = halves(*batch(), 1)
    optimizer.target = y
    optimizer.estimate(lambda: F.cross_entropy(model(x), y))
    everything = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    nn.utils.clip_grad_norm_(everything, 1e-3)
    optimizer.descend()
    moved = torch.cat([(p - q).flatten() for p, q in zip(weights(model), before, strict=True)])
    assert 0 < moved.norm() < 1.001e-3


@every_rule
def test_it_shares_the_pass_of_mixed(rule: Any) -> None:
    model = cnn(dropout=0.0)
    trunk = rule(model[:8], 0.1, **SGD) if rule is not bioopt.DRTP else rule(model, 0.1, **SGD)
    others = [torch.optim.SGD(model[8:].parameters(), 0.1)] if rule is not bioopt.DRTP else []
    mixed, before = bioopt.Mixed(trunk, *others), weights(model)
    trunk.target = batch()[1]
    mixed.step(ordinary(mixed, model, *batch()))
    assert mixed.forward_passes == 1
    assert not any(torch.equal(a, b) for a, b in zip(before, weights(model), strict=True))


@every_rule
@pytest.mark.parametrize(
    ("name", "mode"),
    [*((name, "float32") for name in acts.NETWORKS),
     *((name, mode) for name in ("batch norm", "sequences") for mode in ("channels last", "bf16 autocast"))],
)  # fmt: skip
def test_every_network_learns(rule: Any, name: str, mode: str) -> None:
    model = acts.build(name, mode)
    optimizer = rule(model, 1e-3)
    y, start = acts.batch(mode)[1], weights(model)
    for _ in range(2):
        optimizer.zero_grad()
        optimizer.target = y
        acts.loss_of(model, mode).backward()
        optimizer.step()
    assert all(p.isfinite().all() for p in model.parameters())
    moved = [not torch.equal(a, b) for a, b in zip(start, weights(model), strict=True)]
    assert all(moved)
    # One pass and its replay, in checkpointing, or two firings of one layer give one set of feedback weights.
    assert len(optimizer.feedback_weights()) <= len(bioopt.find_synapses(model))


@every_rule
@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="this torch has no Muon")
def test_descent_by_muon(rule: Any) -> None:
    model = network(bias=False).float()
    optimizer = rule(model, 0.02, descent=torch.optim.Muon)
    losses = []
    for i in range(30):
        x, y = batch(i % 3)
        optimizer.zero_grad()
        optimizer.target = y
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-3:]) < 0.85 * sum(losses[:3])


def test_learned_feedback_follows_a_loss_that_is_dropped() -> None:
    """zero_grad drops what a backward pass has left for feedback weights too."""
    for rule in (bioopt.KolenPollack, bioopt.DirectKolenPollack):
        results = []
        for dropped in (False, True):
            model = network()
            optimizer = rule(model, 0.1, centre_inputs=False, **SGD)
            if dropped:
                ((x, y),) = halves(*batch(7), 1)
                F.cross_entropy(model(x), y).backward()
            optimizer.zero_grad()
            ((x, y),) = halves(*batch(), 1)
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
            results.append([*weights(model), *optimizer.feedback_weights().values()])
        assert same(*results)


@pytest.mark.filterwarnings("ignore:.*did not fire and learn nothing")
@pytest.mark.parametrize("rule", [bioopt.KolenPollack, bioopt.DirectKolenPollack])
def test_feedback_weights_do_not_learn_from_an_earlier_step(rule: Any) -> None:
    """model.zero_grad() knows nothing of the rule's own weights; a layer that rests has no new gradient."""
    results = []
    for own in (True, False):
        model = network((128, 12, 10, 5))
        optimizer = rule(model, 0.1, **SGD)
        for i in range(4):
            (optimizer if own else model).zero_grad()
            model[3].train(i != 2)
            for x, y in halves(*batch(i), 2):
                F.cross_entropy(model(x), y).backward()
            optimizer.step()
        results.append([*weights(model), *optimizer.feedback_weights().values()])
    assert same(*results)
