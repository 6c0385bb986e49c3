"""What the audit finds: known answers, planted cheats, every rule; and nothing left behind."""

from __future__ import annotations

import copy
import json
import math
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import bioopt
from bioopt.core.params import named_parameters_of
from bioopt.feedback.base import LayerwiseFeedback
from bioopt.registry import family_of

from ..rules import CASES, OF_RULE, Case, batch, cnn, mlp, ordinary, per_sample, published, same, weights
from ..test_extending import PredictiveCoding

SIZES = (16, 14, 12, 5)
LABELS = torch.tensor([0, 1, 2])


def small(case: Case) -> tuple[nn.Module, Tensor]:
    """A network of two hidden layers, and a batch of three."""
    generator = torch.Generator().manual_seed(1)
    if OF_RULE[bioopt.ContrastiveDivergence].mlp is case.mlp:
        return case.mlp(), torch.randn(3, 6, dtype=torch.float64, generator=generator)
    return case.mlp(sizes=SIZES), torch.randn(3, SIZES[0], dtype=torch.float64, generator=generator)


def plain(optimizer: Any, model: nn.Module, x: Tensor, y: Tensor) -> Callable[[], Tensor]:
    """A closure that leaves the backward pass to the rule."""
    return lambda: F.cross_entropy(model(x), y, reduction="none")


def audited(make: Callable[[nn.Module], Any], warm: int = 0, form: Callable[..., Any] = per_sample) -> bioopt.Audit:
    model, x = small(OF_RULE[bioopt.FeedbackAlignment])
    optimizer = make(model)
    closure = form(optimizer, model, x, LABELS)
    for _ in range(warm):
        optimizer.step(closure)
    return bioopt.audit(optimizer, model, closure)


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), 0.1)


# -- known answers ----------------------------------------------------------------------------------------------------


def test_backpropagation_transports_weights_and_feedback_alignment_does_not() -> None:
    backprop, feedback = audited(sgd), audited(bioopt.FeedbackAlignment)
    assert all(layer.transport > 1 for layer in backprop.trunk)
    assert all(layer.transport < 1e-12 for layer in feedback.trunk)
    assert math.isnan(backprop.layers[-1].transport)  # nothing lies above
    for found in (backprop, feedback):
        assert (found.forward_passes, found.backward_passes) == (1, 1)
        assert found.depends("error")
        assert not found.depends("loss")
        assert found.depends("layers_above")
    assert backprop.summary.startswith("SGD: weight transport (")
    assert feedback.summary.startswith("FeedbackAlignment: no weight transport; local; the trunk depends on labels and")


def test_transport_is_the_gradient_at_the_changed_weights() -> None:
    """For two layers, by hand: the error of the hidden layer with the unseen part of the upper weights times -2."""
    model, x = mlp(sizes=(6, 12, 4)), torch.randn(3, 6, dtype=torch.float64)
    found = bioopt.audit(sgd(model), model, lambda: F.cross_entropy(model(x), LABELS, reduction="none"))
    h = torch.tanh(model[0](x)).detach()
    w = model[2].weight.detach()
    delta = torch.softmax(model(x), 1) - F.one_hot(LABELS, 4)
    unseen = w - w @ torch.linalg.pinv(h) @ h

    def update(upper: Tensor) -> Tensor:
        error = (delta @ upper) * (1 - h.square())
        return torch.cat([error.T @ x, error.sum(0).unsqueeze(1)], 1).detach()

    expected = (update(w - 3 * unseen) - update(w)).norm() / update(w).norm()
    assert found.layers[0].transport == pytest.approx(expected.item(), rel=1e-9)


@pytest.mark.parametrize(
    ("rule", "reads", "changes"),
    [
        (bioopt.FeedbackAlignment, False, False),
        (bioopt.SignSymmetry, True, False),
        (bioopt.KolenPollack, False, True),
        (bioopt.DirectKolenPollack, False, True),
        (bioopt.DRTP, False, False),
    ],
)
def test_feedback_weights(rule: type, reads: bool, changes: bool) -> None:
    found = audited(OF_RULE[rule].make, warm=1)
    assert found.depends("feedback_reads") is reads
    assert found.depends("transport") is reads
    assert found.feedback_changes is changes
    angles = [layer.feedback_angle for layer in found.layers]
    assert math.isnan(angles[0])  # nothing learns below
    assert 0 < angles[-1] < 120


def test_a_mirror_reads_weights_by_the_response_to_noise_alone() -> None:
    def mirror(model: nn.Module) -> bioopt.LearningRule:
        return bioopt.WeightMirror(model, mirror_samples=2)

    found = audited(mirror, warm=2)
    assert found.largest("feedback_reads") < 1e-12
    assert found.largest("transport") < 1e-12
    assert found.feedback_changes


def test_relaxed_states_transport_weights() -> None:
    """Where activity itself moves with weights that it does not meet, they are read backward."""
    found = audited(lambda m: PredictiveCoding(m, 0.1, steps=3, inference_lr=0.1, beta=1.0), form=plain)
    assert found.largest("transport") > 0.1
    assert found.depends("layers_above")


def test_a_convolution_and_its_patches() -> None:
    model = cnn(dropout=0.0).double()
    x, y = torch.randn(2, 2, 8, 8, dtype=torch.float64), torch.tensor([0, 1])
    found = {}
    for make in (sgd, bioopt.FeedbackAlignment, published.Hebbian):
        optimizer = make(model)
        found[make] = bioopt.audit(optimizer, model, per_sample(optimizer, model, x, y))
        if make is not sgd:
            optimizer.close()
    backprop, *others = found.values()
    assert [layer.name for layer in backprop.layers] == ["0", "4", "8"]
    assert min(layer.transport for layer in backprop.trunk) > 0.5
    assert max(other.largest("transport") for other in others) < 1e-9
    assert backprop.depends("other_samples")  # batch norm mixes them


def test_single_precision_is_enough_for_a_verdict() -> None:
    model, x = mlp(sizes=SIZES, dtype=torch.float32), torch.randn(3, SIZES[0])
    for rule, transports in ((bioopt.FeedbackAlignment, False), (bioopt.SignSymmetry, True)):
        optimizer = rule(model)
        found = bioopt.audit(optimizer, model, per_sample(optimizer, model, x, LABELS))
        optimizer.close()
        assert found.depends("transport") is transports


def test_weights_that_activity_meets_in_full_are_not_measured() -> None:
    """Of 16 inputs, 20 samples leave no part of a weight vector unseen."""
    model, x = mlp(sizes=SIZES), torch.randn(20, SIZES[0], dtype=torch.float64)
    y = torch.arange(20) % 5
    found = bioopt.audit(sgd(model), model, lambda: F.cross_entropy(model(x), y))
    assert found.depends("transport") is None
    assert "weight transport not measured" in found.summary


# -- planted cheats ---------------------------------------------------------------------------------------------------


class StoresTheDifference(LayerwiseFeedback):
    """Feedback alignment in name: B is stored as W + D."""

    def weights_of(self, synapse: bioopt.Synapse) -> Tensor:
        return synapse.weight.detach() + self._drawn(synapse)


class CopiesTheWeights(LayerwiseFeedback):
    """Feedback alignment in name, whose feedback weights are what the forward weights were in the step before."""

    def weights_of(self, synapse: bioopt.Synapse) -> Tensor:
        return self._own_state.get("copies", {}).get(synapse, self._drawn(synapse))

    def feedback_weights(self) -> dict[str, Tensor]:
        return {}

    def learn_feedback(self, grads: dict[Tensor, Tensor], state: dict[str, Any]) -> None:
        state["copies"] = {s: s.weight.detach().clone() for s in self.layers().values()}


class ClipsTheNorm(LayerwiseFeedback):
    """Feedback alignment whose update has length 1, over all layers."""

    def weights_of(self, synapse: bioopt.Synapse) -> Tensor:
        return self._drawn(synapse)

    def learn_feedback(self, grads: dict[Tensor, Tensor], state: dict[str, Any]) -> None:
        length = torch.stack([g.norm() for g in grads.values()]).norm()
        for p in grads:
            grads[p] = grads[p] / length


class CallsAutograd(bioopt.LearningRule):
    """A perturbation rule in name, which differentiates the loss."""

    def __init__(self, params: Any, lr: float = 0.1) -> None:
        super().__init__(params, {"lr": lr})

    def _select(self, group: dict[str, Any]) -> tuple[list[Any], list[Any]]:
        return named_parameters_of(group["params"]), []

    def _estimate(self, probe: bioopt.Probe) -> Any:
        params = self._trained()
        loss = probe(grad=True)
        with torch.enable_grad():
            grads = torch.autograd.grad(loss.mean(), params)
        return loss.detach(), dict(zip(params, grads, strict=True)), {}


class Cheat(bioopt.LocalProductRule):
    """Δw = ⟨s xᵀ⟩, with a signal of its own."""

    def update(self, product: Tensor, signal: Any, synapse: bioopt.Synapse, group: dict[str, Any]) -> Tensor:
        return product


class Honest(Cheat):
    """A Hebbian rule."""

    def signal(self, u: Tensor, synapse: bioopt.Synapse, group: dict[str, Any]) -> Tensor:
        return u


class NormalisedByAnother(Cheat):
    """A Hebbian rule whose signal is divided by the length of another layer's weights."""

    other: nn.Linear

    def signal(self, u: Tensor, synapse: bioopt.Synapse, group: dict[str, Any]) -> Tensor:
        return u / self.other.weight.norm()


class Peeks(Cheat):
    """A Hebbian rule whose signal is the activity of samples of class 1, by the target or by labels of its own."""

    mine: Tensor | None = None

    def signal(self, u: Tensor, synapse: bioopt.Synapse, group: dict[str, Any]) -> Tensor:
        labels = self.mine if self.mine is not None else self.target
        return u * (labels == 1).to(u.dtype).unsqueeze(1)


class ReadsANeighbour(Cheat):
    """The signal of all neurons is scaled by the weights of the first."""

    def signal(self, u: Tensor, synapse: bioopt.Synapse, group: dict[str, Any]) -> Tensor:
        return u * synapse.weight.detach()[0].abs().sum()


class ScaledByTheBatch(Cheat):
    """The signal is divided by the largest of all samples."""

    def signal(self, u: Tensor, synapse: bioopt.Synapse, group: dict[str, Any]) -> Tensor:
        return u / u.abs().max()


def build(cls: type, **more: Any) -> Callable[[nn.Module], Any]:
    def make(model: nn.Sequential) -> Any:
        rule = cls(model, 0.1, readout_lr=0.1)
        for name, value in more.items():
            setattr(rule, name, value(model))
        return rule

    return make


def test_an_honest_rule_passes() -> None:
    found = audited(build(Honest))
    for measure in ("transport", "other_layers", "other_neurons", "other_samples", "labels", "error", "loss"):
        assert found.largest(measure) < 1e-9, measure
    assert found.largest("layers_above") == 0
    assert found.summary == (
        "Honest: no weight transport; local; neither labels nor loss reach the trunk; no update locking; "
        "1 forward, 0 backward passes."
    )


def test_feedback_weights_stored_as_a_difference_are_caught() -> None:
    found = audited(StoresTheDifference)
    assert found.largest("transport") > 0.1
    assert found.largest("feedback_reads") > 0.1


def test_weights_that_are_copied_for_the_next_step_are_caught() -> None:
    assert audited(CopiesTheWeights).largest("transport") > 0.1


def test_one_length_for_the_updates_of_all_layers_is_caught() -> None:
    found = audited(ClipsTheNorm)
    assert found.layers[1].other_layers > 1e-3
    assert found.largest("other_samples") > 1e-3
    assert found.largest("transport") < 1e-12


def test_a_gradient_of_the_loss_is_caught() -> None:
    found = audited(CallsAutograd, form=plain)
    assert found.largest("transport") > 1
    assert found.backward_passes == 1
    assert not found.depends("loss")  # the value of the loss, which a perturbation rule needs, does not matter


def test_the_weights_of_another_layer_are_caught() -> None:
    above, below = (audited(build(NormalisedByAnother, other=lambda m, i=i: m[i])) for i in (4, 0))
    assert min(layer.transport for layer in above.trunk) > 0.1
    assert below.layers[1].other_layers > 0.1
    assert below.layers[1].transport < 1e-9


def test_labels_are_caught() -> None:
    model, x = small(OF_RULE[bioopt.FeedbackAlignment])
    optimizer = build(Peeks)(model)

    def closure() -> Tensor:
        optimizer.zero_grad()
        optimizer.target = LABELS
        losses = F.cross_entropy(model(x), LABELS, reduction="none")
        losses.mean().backward()
        return losses

    found = bioopt.audit(optimizer, model, closure)
    assert found.depends("labels")
    assert not found.depends("error")
    assert "the trunk depends on labels" in found.summary
    optimizer.close()


def test_labels_by_some_other_way_are_caught_if_the_audit_has_them() -> None:
    labels = LABELS.clone()
    found = []
    for given in (None, labels):
        model, x = small(OF_RULE[bioopt.FeedbackAlignment])
        optimizer = build(Peeks, mine=lambda _: labels)(model)
        found.append(bioopt.audit(optimizer, model, per_sample(optimizer, model, x, labels), labels=given))
        assert torch.equal(labels, LABELS)
    assert [one.depends("labels") for one in found] == [False, True]


@pytest.mark.parametrize("inside", [False, True])
def test_a_target_that_is_another_tensor_is_permuted_with_the_labels(inside: bool) -> None:
    """Once, also where the closure makes it from the labels: two permutations of two samples would be none."""
    labels = LABELS[:2].clone()
    model, x = small(OF_RULE[bioopt.FeedbackAlignment])
    optimizer = bioopt.DRTP(model)
    target = optimizer.target = F.one_hot(labels, 5).double()

    def closure() -> Tensor:
        if inside:
            optimizer.target = F.one_hot(labels, 5).double()
        return F.cross_entropy(model(x[:2]), labels, reduction="none")

    assert bioopt.audit(optimizer, model, closure, labels=labels).depends("labels")
    assert optimizer.target is target
    assert torch.equal(labels, LABELS[:2])


def test_a_neighbour_s_weights_are_caught() -> None:
    found = audited(build(ReadsANeighbour))
    assert min(layer.other_neurons for layer in found.trunk) > 0.01


def test_the_scale_of_a_batch_is_caught() -> None:
    found = audited(build(ScaledByTheBatch))
    assert found.largest("other_samples") > 1e-3
    assert found.largest("other_layers") < 1e-9


def test_a_rule_that_stops_depends_on_what_made_it_stop() -> None:
    """Relaxing states compare energies, which rise where the value of the loss does not fit its error."""
    found = audited(lambda m: bioopt.PredictiveCoding(m, steps=2))
    assert {layer.loss for layer in found.layers} == {1.0}
    assert found.depends("transport")
    error = audited(lambda m: bioopt.PredictiveCoding(m, steps=1, mode="error"))
    assert error.depends("loss") is False


# -- every rule -------------------------------------------------------------------------------------------------------

#: what makes the evaluations of a step few enough for weights that no activity meets
FEW = {"samples": 1, "population": 1, "coordinates": 10, "mirror_samples": 2}
#: what the trunk may depend on, besides other neurons of the layer and other samples
SIGNALS = {
    "feedback": {"labels", "error", "layers_above"},
    "local": {"labels"},
    "perturbation": {"labels", "loss", "layers_above"},
    "energy": {"labels", "error", "layers_above", "transport"},
    "temporal": {"labels", "error", "layers_above"},
    "target": {"labels", "error", "layers_above"},
}
REWARD = {"labels", "loss", "layers_above"}
OTHER_SIGNALS = {
    bioopt.RewardHebbian: REWARD,
    bioopt.RewardSTDP: REWARD,
    bioopt.DRTP: {"labels"},
    bioopt.LocalContrastive: set(),
    bioopt.SignSymmetry: {"labels", "error", "layers_above", "transport", "feedback_reads"},
}
#: whose trunk has no update in the first steps, or seldom another one
NOT_MEASURED = ("Homeostasis", "Hebbian, by default", "HillClimbing")
#: whose relaxation has steps enough here to notice that the energy, and with it the value of the loss, has risen
COMPARES_ENERGIES = (
    *("EquilibriumPropagation", "PredictiveCoding"),
    *("PredictiveCoding, incremental", "PredictiveCoding, mu_pc"),
)
CLAIMS = ("transport", "other_layers", "labels", "error", "loss", "layers_above", "feedback_reads")


def few(case: Case) -> dict[str, Any]:
    return {name: value for name, value in FEW.items() if case.takes(name) and name not in case.options}


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.filterwarnings("ignore:.*the closure calls backward")
def test_each_rule_depends_on_what_its_family_is_made_for_and_on_nothing_else(case: Case) -> None:
    """Convolutions, batch norm and dropout; samples that batch norm mixes are not compared."""
    model, (x, y) = case.cnn().double(), batch(n=2)
    optimizer = case.make(model, **few(case))
    closure = per_sample(optimizer, model, x.double(), y)
    optimizer.step(closure)
    found = bioopt.audit(optimizer, model, closure)
    if str(case) not in NOT_MEASURED:
        depends = {measure for measure in CLAIMS if found.depends(measure)}
        expected = OTHER_SIGNALS.get(case.rule, SIGNALS.get(family_of(case.rule), set()))
        if str(case) in COMPARES_ENERGIES:
            expected = expected | {"loss"}
        assert depends == expected, f"OTHER_SIGNALS can name what a rule is made for.\n{found}"
        assert found.depends("transport") is not None
    assert found.rule == case.name
    assert (found.loss_numbers > 0) == bool(found.depends("loss"))
    assert len(str(found).splitlines()) == len(found.layers) + 2
    assert json.loads(json.dumps(found.as_dict()))["rule"] == case.name


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.filterwarnings("ignore:.*the closure calls backward")
@pytest.mark.filterwarnings("ignore:.*needs no backward pass")
@pytest.mark.long
def test_an_audit_changes_nothing(case: Case) -> None:
    """Weights, buffers, state, gradients and random numbers; later steps are those of a twin, bit for bit."""
    model, x = small(case)
    twin, _ = small(case)
    optimizer, other = case.make(model, **few(case)), case.make(twin, **few(case))
    for o, m in ((optimizer, model), (other, twin)):
        torch.manual_seed(0)
        o.step(per_sample(o, m, x, LABELS))
    before = [weights(model), [b.clone() for b in model.buffers()], copy.deepcopy(optimizer.state_dict()["state"])]
    grads, random = [p.grad for p in model.parameters()], torch.get_rng_state()
    hooks = [str(vars(m).keys()) + str(len(m._forward_hooks) + len(m._forward_pre_hooks)) for m in model.modules()]
    bioopt.audit(optimizer, model, ordinary(optimizer, model, x, LABELS))
    assert same(before[0], weights(model))
    assert same(before[1], list(model.buffers()))
    assert str(optimizer.state_dict()["state"]) == str(before[2])
    assert all(p.grad is g for p, g in zip(model.parameters(), grads, strict=True))
    assert torch.equal(torch.get_rng_state(), random)
    assert hooks == [
        str(vars(m).keys()) + str(len(m._forward_hooks) + len(m._forward_pre_hooks)) for m in model.modules()
    ]
    for o, m in ((optimizer, model), (other, twin)):
        torch.set_rng_state(random)
        o.step(per_sample(o, m, x, LABELS))
    assert same(weights(model), weights(twin))


def test_an_error_on_the_way_leaves_nothing_behind() -> None:
    model, x = small(OF_RULE[bioopt.FeedbackAlignment])
    optimizer, before = bioopt.FeedbackAlignment(model), weights(model)

    def closure() -> Tensor:
        if not same(before, weights(model)):  # inside of an intervention
            raise KeyboardInterrupt
        return F.cross_entropy(model(x), LABELS, reduction="none")

    with pytest.raises(KeyboardInterrupt):
        bioopt.audit(optimizer, model, closure)
    assert same(before, weights(model))
    assert all("forward" not in vars(m) for m in model.modules())
    assert all(len(m._forward_hooks) <= 1 for m in model.modules())
    optimizer.step(lambda: F.cross_entropy(model(x), LABELS, reduction="none"))


# -- bad input --------------------------------------------------------------------------------------------------------


def test_what_cannot_be_audited_is_explained() -> None:
    model, x = small(OF_RULE[bioopt.FeedbackAlignment])
    optimizer = bioopt.FeedbackAlignment(model)

    def closure() -> Tensor:
        return F.cross_entropy(model(x), LABELS)

    with pytest.raises(TypeError, match="takes a single optimizer, not Mixed; audit its members"):
        bioopt.audit(bioopt.Mixed(optimizer), model, closure)
    with pytest.raises(TypeError, match="takes the model that the closure runs, not a function"):
        bioopt.audit(optimizer, closure, closure)
    with pytest.raises(RuntimeError, match=re.escape("layer '0' is also watched by a rule other than SGD: close()")):
        bioopt.audit(sgd(model), model, closure)
    with pytest.raises(RuntimeError, match="runs no layer of the model"):
        bioopt.audit(sgd(model), mlp(), closure)
    with pytest.raises(TypeError, match="a function that runs the model and returns the loss, not a NoneType"):
        bioopt.audit(optimizer, model, None)
    with pytest.raises(RuntimeError, match="runs under autocast"), torch.autocast("cpu", torch.bfloat16):
        bioopt.audit(optimizer, model, closure)
    optimizer.close()
    batches = iter(torch.randn(9, 3, SIZES[0], dtype=torch.float64))
    with pytest.raises(RuntimeError, match="two evaluations from the same state gave layer '0' different updates"):
        bioopt.audit(sgd(model), model, lambda: F.cross_entropy(model(next(batches)), LABELS))
    with pytest.raises(ValueError, match=re.escape("not torch.bfloat16: model.double()")):
        bioopt.audit(optimizer, nn.Linear(2, 2, dtype=torch.bfloat16), closure)
    rule = bioopt.NodePerturbation(model, batched=True)
    with pytest.raises(ValueError, match=re.escape("build the rule with batched=False")):
        bioopt.audit(rule, model, lambda: F.cross_entropy(model(x), LABELS, reduction="none"))


def test_a_layer_without_an_update_has_no_measures() -> None:
    model, x = small(OF_RULE[bioopt.FeedbackAlignment])
    model[2].requires_grad_(False)
    found = bioopt.audit(sgd(model), model, lambda: F.cross_entropy(model(x), LABELS))
    assert [layer.name for layer in found.layers] == ["0", "4"]
    control = audited(lambda m: bioopt.Homeostasis(m), warm=1)
    assert "the trunk has no update" in control.summary
