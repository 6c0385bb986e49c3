"""Rules claim only what they can train: layers that never fire, that changed, that are excluded."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

import bioopt

from ..rules import LOCAL, ORDINARY, Case, give_target, mlp, per_sample, published

FIRING = [case for case in ORDINARY if not case.takes_parameters or case.takes("space")]
# 16 samples: homeostasis needs that many to begin with.
X, Y = torch.randn(16, 6, generator=torch.Generator().manual_seed(0)), torch.arange(16) % 4
every_rule = pytest.mark.parametrize("case", ORDINARY, ids=str)
firing_rule = pytest.mark.parametrize("case", FIRING, ids=str)


def build(case: Case, model: nn.Module, **options: Any) -> bioopt.LearningRule:
    """A rule of activities, where it has a choice."""
    return case.make(model, **case.taking(space="activities"), **options)


def losses(model: nn.Module, optimizer: Any = None) -> Callable[[], Tensor]:
    def closure() -> Tensor:
        give_target(optimizer, Y)
        return F.cross_entropy(model(X), Y, reduction="none")

    return closure


def network() -> nn.Sequential:
    return mlp(sizes=(6, 5, 5, 4), dtype=torch.float32)


class ByWeight(nn.Module):
    """Uses a layer's weight without calling it, as attention blocks do."""

    def __init__(self) -> None:
        super().__init__()
        self.mix, self.hidden, self.head = nn.Linear(6, 5), nn.Linear(5, 5), nn.Linear(5, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.hidden(torch.tanh(F.linear(x, self.mix.weight, self.mix.bias)))))


@firing_rule
def test_layers_that_do_not_fire_are_named_once_and_not_claimed(case: Case) -> None:
    model = ByWeight()
    optimizer = build(case, model)
    with pytest.warns(UserWarning, match=rf"{case.name}: .*learn nothing: 'mix' \(it did not run, or .*its weight"):
        optimizer.step(losses(model, optimizer))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.step(losses(model, optimizer))
    covered = optimizer.coverage(model)
    assert covered["mix.weight"].startswith("silent: it did not run")
    assert covered["hidden.weight"] == case.name


@firing_rule
def test_a_layer_that_is_switched_is_warned_of_again(case: Case) -> None:
    model = network()
    optimizer = build(case, model)
    optimizer.step(losses(model, optimizer))
    model[2].eval()
    with pytest.warns(UserWarning, match=r"learn nothing: '2' \(it is in evaluation mode: call train\(\)\)"):
        optimizer.step(losses(model, optimizer))
    assert "evaluation mode" in optimizer.coverage()["2.weight"]
    model[2].train()
    optimizer.step(losses(model, optimizer))
    assert optimizer.coverage()["2.weight"] == case.name
    model[2].weight.requires_grad_(False)  # on purpose
    optimizer.step(losses(model, optimizer))
    assert optimizer.coverage()["2.weight"] == "frozen"


@firing_rule
def test_a_layer_unfrozen_later_is_warned_of_and_can_be_added(case: Case) -> None:
    model = network()
    model[0].requires_grad_(False)
    optimizer = build(case, model)
    optimizer.step(losses(model, optimizer))
    assert optimizer.coverage(model)["0.weight"] == "frozen"
    model[0].requires_grad_(True)
    with pytest.warns(UserWarning, match=r"'0' \(it was frozen when the optimizer was built: .*add_param_group"):
        optimizer.step(losses(model, optimizer))
    assert optimizer.coverage(model)["0.weight"].startswith("silent: it was frozen")
    optimizer.add_param_group({"params": model[0]})
    before = model[0].weight.clone()
    optimizer.step(losses(model, optimizer))
    assert optimizer.coverage(model)["0.weight"] == case.name
    assert not torch.equal(before, model[0].weight)


@firing_rule
def test_a_module_that_was_replaced_is_warned_of(case: Case) -> None:
    model = network()
    optimizer = build(case, model)
    model[0] = nn.Linear(6, 5)
    with pytest.warns(UserWarning, match=r"'0' \(it was replaced in the model"):
        optimizer.step(losses(model, optimizer))


@every_rule
@pytest.mark.parametrize("change", ["replace", "prune", "parametrize", "to_empty"])
def test_parameters_that_were_exchanged_are_an_error(case: Case, change: str) -> None:
    model = network()
    if change == "to_empty":
        model = model.to("meta")
    optimizer = build(case, model)
    if change == "replace":
        model[2].weight = nn.Parameter(torch.randn(5, 5))
    elif change == "prune":
        prune.l1_unstructured(model[2], "weight", 0.5)
    elif change == "parametrize":
        parametrizations.spectral_norm(model[2])
    else:
        model.to_empty(device="cpu")
        for p in model.parameters():
            nn.init.normal_(p)
    if change in ("prune", "parametrize") and case not in FIRING:
        before = [p.detach().clone() for p in model.parameters()]
        for _ in range(20):
            optimizer.step(losses(model, optimizer))  # the parameter beneath is still the one that is trained
        assert any(not torch.equal(p, q) for p, q in zip(before, model.parameters(), strict=True))
        return
    name = "'0.weight'" if change == "to_empty" else "'2.weight'"
    way_out = "Build the optimizer after" if change in ("replace", "to_empty") else r"Undo that, .*exclude=\['2'\]"
    with pytest.raises(RuntimeError, match=rf"{case.name}: parameter {name} was .*{way_out}"):
        optimizer.step(losses(model, optimizer))


# -- exclude --------------------------------------------------------------------------------------------------


class Positions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.places = nn.Parameter(torch.zeros(1, 6))
        self.attention = nn.MultiheadAttention(6, 2)
        self.one, self.two, self.head = nn.Linear(6, 5), nn.Linear(5, 5), nn.Linear(5, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.places
        x = x + self.attention(x, x, x)[0]
        return self.head(torch.tanh(self.two(torch.tanh(self.one(x)))))


@firing_rule
def test_one_error_names_all_layers_with_the_line_that_excludes_them(case: Case) -> None:
    model = Positions()
    with pytest.raises(ValueError, match=rf"{case.name} cannot train") as refused:
        build(case, model)
    message = str(refused.value)
    assert "'attention' of type MultiheadAttention" in message
    assert "type Positions with places" in message
    line = message[message.index("exclude=") : message.index("], or freeze") + 1]
    assert line == "exclude=[torch.nn.MultiheadAttention, 'places']"
    optimizer = eval(f"build(case, model, {line})")
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer.step(losses(model, optimizer))
    covered = optimizer.coverage(model)
    for name, p in model.named_parameters():
        excluded = name.startswith(("attention", "places"))
        assert (covered[name] == "excluded") == excluded
        assert torch.equal(p, before[name]) or not excluded
    assert covered["one.weight"] == case.name


def test_depthwise_layers_are_named_together() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 6, 3), nn.Conv2d(6, 6, 3, groups=6), nn.Conv2d(6, 6, 3, groups=6), nn.Embedding(3, 4),
        nn.Flatten(), nn.Linear(6, 4),
    )  # fmt: skip
    with pytest.raises(ValueError, match=r"it has 1 in each group.*exclude=\[torch.nn.Embedding, '1', '2'\]"):
        published.SoftHebb(model, 0.1)
    published.SoftHebb(model, 0.1, exclude=[nn.Embedding, "1", model[2]])


@every_rule
def test_excluded_parameters_do_not_move(case: Case) -> None:
    model = network()
    optimizer = case.make(model, exclude=[0, "2.bias"])
    before = [p.detach().clone() for p in (*model[0].parameters(), model[2].weight)]
    for _ in range(20 if case not in FIRING else 1):
        optimizer.step(losses(model, optimizer))
    assert all(torch.equal(p, q) for p, q in zip(model[0].parameters(), before, strict=False))
    assert optimizer.coverage() == {**optimizer.coverage(), "0.weight": "excluded", "2.bias": "excluded"}
    if case.rule is not bioopt.SerialPerturbation:
        assert not torch.equal(model[2].weight, before[-1])


@pytest.mark.parametrize("case", [case for case in LOCAL if case.ordinary], ids=str)
def test_excluding_the_readout_asks_for_another(case: Case) -> None:
    model = network()
    with pytest.raises(ValueError, match=r"exclude leaves out '4', the last layer.*readout_layer='2'.*readout=None"):
        case.make(model, exclude=["4"])
    assert case.make(model, exclude=["4"], readout_layer="2").coverage()["2.weight"].endswith("readout (delta)")
    case.make(model, exclude=["4"], readout=None)


def test_what_cannot_be_excluded_is_explained() -> None:
    model = network()
    with pytest.raises(ValueError, match="Hebbian: exclude has 'fc', which is no module or parameter"):
        published.Hebbian(model, 0.1, exclude=["fc"])
    with pytest.raises(ValueError, match="exclude has a Linear, which is no module"):
        published.Hebbian(model, 0.1, exclude=[nn.Linear(2, 2)])
    with pytest.raises(TypeError, match=r"exclude has 3\.5; it takes module types"):
        published.Hebbian(model, 0.1, exclude=[3.5])
    with pytest.raises(TypeError, match=r"WeightPerturbation: exclude=\['0'\] needs modules to look in"):
        bioopt.WeightPerturbation(model.parameters(), 0.1, sigma=0.1, exclude=["0"])
    with pytest.raises(ValueError, match="no plastic layer"):
        published.Hebbian(model, 0.1, exclude=nn.Linear)


def test_excluded_types_hold_for_later_groups() -> None:
    model = nn.ModuleList([nn.Linear(6, 5), nn.Sequential(nn.Linear(5, 5), nn.MultiheadAttention(4, 2))])
    optimizer = published.Hebbian([model[0]], 0.1, readout=None, exclude=[nn.MultiheadAttention])
    optimizer.add_param_group({"params": model[1]})
    assert list(optimizer.coverage(model).values()).count("excluded") == 4


@every_rule
@pytest.mark.filterwarnings("ignore:Complex modules are a new feature")
def test_complex_parameters_are_refused(case: Case) -> None:
    model = network().to(torch.complex64)
    with pytest.raises(ValueError, match=rf"{case.name}: parameter '0.weight' is complex .*view_as_real"):
        case.make(model)


class Adapter(nn.Module):
    """A low-rank adapter around a frozen layer, as LoRA puts it."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.down, self.up = nn.Linear(base.in_features, 1), nn.Linear(1, base.out_features)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.up(self.down(x))


@firing_rule
@pytest.mark.parametrize("change", ["adapters", "quantization"])
def test_models_that_are_rebuilt_after_the_optimizer_say_so(case: Case, change: str) -> None:
    model = network()
    optimizer = build(case, model)
    if change == "adapters":
        for i in (0, 2, 4):
            model[i] = Adapter(model[i])
    else:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that it is deprecated
            model.qconfig = torch.ao.quantization.get_default_qat_qconfig("fbgemm")
            torch.ao.quantization.prepare_qat(model, inplace=True)
    why = "frozen after .*adapters" if change == "adapters" else "replaced in the model after"
    with pytest.raises(RuntimeError, match=rf"{case.name}: no synapse has fired .*{why}.*build a new optimizer"):
        optimizer.step(losses(model, optimizer))


# -- exclusion by the name of a parameter, tied weights, second names ---------------------------------------------


@firing_rule
def test_parameters_excluded_by_name_do_not_learn(case: Case) -> None:
    model = network()
    optimizer = build(case, model, exclude=["0.weight", "2.bias"])
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer.step(losses(model, optimizer))
    now = dict(model.named_parameters())
    assert torch.equal(now["0.weight"], before["0.weight"])
    assert torch.equal(now["2.bias"], before["2.bias"])
    assert not torch.equal(now["2.weight"], before["2.weight"])
    assert [optimizer.coverage()[name] for name in ("0.weight", "2.bias")] == ["excluded", "excluded"]


def test_a_weight_tied_to_an_excluded_layer_stays() -> None:
    model = nn.ModuleDict({"a": nn.Linear(6, 6), "b": nn.Linear(6, 6), "c": nn.Linear(6, 4)})
    model["b"].weight = model["a"].weight
    optimizer = bioopt.NodePerturbation(model, 0.1, sigma=0.1, exclude=["a"])
    before = model["b"].weight.clone()
    optimizer.step(lambda: F.cross_entropy(model["c"](model["b"](torch.tanh(model["a"](X)))), Y, reduction="none"))
    assert torch.equal(before, model["b"].weight)


def test_types_cover_their_subclasses_and_modules_all_their_names() -> None:
    class Own(nn.Linear):
        pass

    bioopt.register_synapse(Own, channel_dim=-1)
    model = nn.ModuleDict({"first": Own(6, 5), "last": nn.Conv1d(2, 3, 1), "out": nn.Conv1d(3, 3, 1)})
    model["again"] = model["first"]
    assert published.Hebbian(model, 0.1, exclude=nn.Linear).coverage()["first.weight"] == "excluded"
    assert published.Hebbian(model, 0.1, exclude="again").coverage()["first.weight"] == "excluded"
    assert published.Hebbian(network(), 0.1, exclude=0, readout_layer=4).coverage()["0.weight"] == "excluded"


def test_a_layer_replaced_later_is_warned_of_and_experts_in_turn_are_not() -> None:
    model = nn.ModuleList([nn.Linear(6, 5), nn.Linear(6, 5), nn.Linear(5, 4)])
    optimizer = bioopt.NodePerturbation(model, 0.01, sigma=0.01)

    def step(expert: int) -> None:
        optimizer.step(lambda: F.cross_entropy(model[2](torch.tanh(model[expert](X))), Y, reduction="none"))

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for i in range(8):
            model[0].requires_grad_(i % 3 > 0)
            step(i % 2)
    assert len(caught) <= 2  # of each expert once
    model[2] = nn.Linear(5, 4)
    with pytest.warns(UserWarning, match=r"'2' \(it was replaced in the model"):
        step(0)
    assert optimizer.coverage()["2.weight"] == "frozen"  # that of the new layer


def test_lazy_and_parametrized_layers_are_refused_with_the_way_out() -> None:
    def lazy() -> nn.Module:
        return nn.Sequential(nn.Linear(20, 8), nn.ReLU(), nn.LazyLinear(16), nn.ReLU(), nn.Linear(16, 5))

    def normalised() -> nn.Module:
        return nn.Sequential(
            *(nn.Linear(20, 24), nn.ReLU(), nn.utils.parametrizations.weight_norm(nn.Linear(24, 16)), nn.ReLU()),
            nn.Linear(16, 5),
        )

    for rule in (bioopt.Hebbian, bioopt.FeedbackAlignment, bioopt.LocalLoss, bioopt.PredictiveCoding):
        with pytest.raises(
            ValueError, match=r"layer '2' of type LazyLinear \(it has no size yet: call model\(x\) once"
        ):
            rule(lazy())
        with pytest.raises(ValueError, match=r"layer '2' .*remove_parametrizations.*exclude=\['2'\]"):
            rule(normalised())
        rule(normalised(), exclude=["2"])
        sized = lazy()
        sized(torch.randn(2, 20))
        rule(sized)


def test_block_rules_refuse_an_unfrozen_layer() -> None:
    model = nn.Sequential(nn.Linear(20, 24), nn.ReLU(), nn.Linear(24, 16), nn.ReLU(), nn.Linear(16, 5))
    model[2].requires_grad_(False)
    optimizer = bioopt.MonoForward(model)
    model[2].requires_grad_(True)
    with pytest.raises(ValueError, match="layer '2' would end the block before it elsewhere"):
        optimizer.add_param_group({"params": model[2]})
    assert len(optimizer.param_groups) == len(bioopt.MonoForward(model).param_groups)


def test_the_state_of_a_model_of_other_sizes_is_refused() -> None:
    def taught(rule: Any, width: int) -> Any:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(20, width), nn.ReLU(), nn.Linear(width, 5))
        optimizer = rule(model)
        optimizer.step(per_sample(optimizer, model, torch.randn(32, 20), torch.arange(32) % 5))
        return optimizer

    for rule in (
        *(bioopt.Hebbian, bioopt.Homeostasis, bioopt.FeedbackAlignment, bioopt.SignSymmetry),
        *(bioopt.PredictiveCoding, bioopt.NodePerturbation, bioopt.WeightPerturbation, bioopt.RewardHebbian),
    ):
        mine = taught(rule, 30)
        before = copy.deepcopy(mine.state_dict())
        with pytest.raises(ValueError, match=r"of a model of other sizes: .*24.* there and .*30.* here"):
            mine.load_state_dict(taught(rule, 24).state_dict())
        torch.testing.assert_close(mine.state_dict()["state"], before["state"])
        mine.load_state_dict(taught(rule, 30).state_dict())


@pytest.mark.parametrize("rule", [bioopt.Hebbian, bioopt.FeedbackAlignment])
def test_a_layer_that_was_parametrized_is_named_as_in_the_model(rule: type) -> None:
    """Also where it is the readout, which has a param group of its own."""
    model = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 4))
    optimizer = rule(model)
    nn.utils.parametrizations.spectral_norm(model[2])
    with pytest.raises(RuntimeError, match=r"parameter '2\.weight' was pruned.*exclude=\['2'\]"):
        optimizer.step(lambda: model(torch.randn(8, 6)).square().mean())
