"""One row for each rule of `bioopt.__all__`, by which every contract test builds it, and what tests share."""

from __future__ import annotations

import inspect
import typing
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import bioopt
from bioopt.local import BlockRule
from bioopt.registry import family_of


def cnn(seed: int = 0, dropout: float = 0.2) -> nn.Sequential:
    """What may trouble a rule: in-place activation, batch norm with affine, dropout, bias."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Conv2d(2, 6, 3, padding=1),
            nn.BatchNorm2d(6),
            nn.ReLU(inplace=True),
            nn.MaxPool2d(2),
            nn.Conv2d(6, 8, 3, bias=False),
            nn.ReLU(inplace=True),
            nn.Flatten(),
            nn.Dropout(dropout),
            nn.Linear(32, 5),
        )


def averaging_cnn(seed: int = 0, dropout: float = 0.2) -> nn.Sequential:
    """`cnn` with average pooling, for states that change continuously."""
    model = cnn(seed, dropout)
    model[3] = nn.AvgPool2d(2)
    return model


class Machine(bioopt.nn.RBM):
    """An RBM of any input: flattened, and squashed into its range."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.flatten(1).sigmoid())


def machines(seed: int = 0, dropout: float = 0.2) -> nn.Sequential:
    """`cnn` in RBMs: layers, batch norm and dropout stand at the same places."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(
            Machine(128, 6),
            nn.BatchNorm1d(6),
            nn.Dropout(dropout),
            nn.Sigmoid(),
            bioopt.nn.RBM(6, 8),
            bioopt.nn.RBM(8, 32),
            nn.Linear(32, 5),
        )


def machine(dtype: torch.dtype = torch.float64) -> nn.Sequential:
    """`mlp` with an RBM."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(Machine(6, 5), nn.Linear(5, 4)).to(dtype)


def mlp(seed: int = 0, sizes: tuple[int, ...] = (6, 5, 4), dtype: torch.dtype = torch.float64) -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        layers: list[nn.Module] = []
        for a, b in pairwise(sizes):
            layers += [nn.Linear(a, b), nn.Tanh()]
        return nn.Sequential(*layers[:-1]).to(dtype)


class Neurons(nn.Module):
    """Leaky integrate-and-fire: the voltage halves each step, a spike takes 0.3 from it; a surrogate gradient."""

    def forward(self, u: Tensor, v: Tensor | None = None) -> tuple[Tensor, Tensor]:
        v = u if v is None else 0.5 * v + u
        slope = torch.sigmoid(v)
        s = (v > 0.3).to(u.dtype) + (slope - slope.detach())
        return s, v - 0.3 * s.detach()


class SpikingNet(nn.Sequential):
    """Unrolls three time steps; what is no part of time (normalisation, dropout) works on the image before them."""

    def encode(self, x: Tensor, step: int) -> Tensor:
        return (x > 0.5 * step).to(x.dtype)  # the stronger, the more spikes

    def forward(self, x: Tensor) -> Tensor:
        for module in self:
            if isinstance(module, nn.BatchNorm2d | nn.Dropout):
                x = module(x)
        total = torch.zeros(())
        voltage: dict[nn.Module, Tensor | None] = {}
        for step in range(3):
            h = self.encode(x, step)
            for module in self:
                if isinstance(module, Neurons):
                    h, voltage[module] = module(h, voltage.get(module))
                elif not isinstance(module, nn.BatchNorm2d | nn.Dropout):
                    h = module(h)
                if type(module) is nn.Linear:
                    u = h
            total = total + u
        return total


class CurrentNet(SpikingNet):
    """The image is a current, so that errors reach what works on it."""

    def encode(self, x: Tensor, step: int) -> Tensor:
        return x


def spiking_cnn(seed: int = 0, dropout: float = 0.2, net: type[SpikingNet] = SpikingNet) -> nn.Sequential:
    """`cnn` for rules of spikes: convolutions, batch norm, readout and bias stand in the same places."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return net(
            nn.Conv2d(2, 6, 3, padding=1),
            nn.BatchNorm2d(2),
            Neurons(),
            nn.MaxPool2d(2),
            nn.Conv2d(6, 8, 3, bias=False),
            Neurons(),
            nn.Flatten(),
            nn.Dropout(dropout),
            nn.Linear(32, 5),
            Neurons(),
        )


def current_cnn(seed: int = 0, dropout: float = 0.2) -> nn.Sequential:
    """`spiking_cnn` for rules of errors."""
    return spiking_cnn(seed, dropout, CurrentNet)


def spiking_mlp(seed: int = 0, sizes: tuple[int, ...] = (6, 5, 4), dtype: torch.dtype = torch.float64) -> nn.Sequential:
    """`mlp` for rules of spikes."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return SpikingNet(*(m for a, b in pairwise(sizes) for m in (nn.Linear(a, b), Neurons()))).to(dtype)


def keywords(call: Callable[..., Any]) -> set[str]:
    """The arguments that a call takes by name, those of an unpacked TypedDict included."""
    names = set()
    for name, parameter in inspect.signature(call).parameters.items():
        if parameter.kind == parameter.VAR_KEYWORD:
            hint = typing.get_type_hints(call)[name]
            if typing.get_origin(hint) is typing.Unpack:
                names |= typing.get_type_hints(typing.get_args(hint)[0]).keys()
        elif parameter.kind != parameter.VAR_POSITIONAL:
            names.add(name)
    return names - {"self"}


def is_rate(lr: Any) -> bool:
    return isinstance(lr, float) and lr >= 0


def required(rule: type) -> list[str]:
    """The options that a rule cannot be built without, besides its parameters and lr."""
    parameters = inspect.signature(rule).parameters.values()
    return [p.name for p in parameters if p.kind == p.KEYWORD_ONLY and p.default is p.empty]


@dataclass(frozen=True)
class Case:
    """How the contract tests build a rule, and what they run it on. All else follows from the class.

    Attributes:
        rule: the class.
        options: constructor options that the tests need: those that are required, and what makes a step change weights.
        cnn: a network of the structure of `cnn` that the rule can train.
        mlp: the same for `mlp`.
        needs_target: whether a step needs ``optimizer.target``.
        chain: whether it trains chains of layers alone, each of which runs once.
        evaluates_once: whether a step with a closure evaluates it once; rules of one pass do.
        perturbs_first: whether the first evaluation of a step is a perturbed one, which batch statistics come from.
        build: what makes the optimizer in the place of the class.
        variant: names a further row of a rule, with other options.
    """

    rule: type
    options: dict[str, Any] = field(default_factory=dict)
    cnn: Callable[..., nn.Sequential] = cnn
    mlp: Callable[..., nn.Sequential] = mlp
    needs_target: bool = False
    chain: bool = False
    evaluates_once: bool = False
    perturbs_first: bool = False
    build: Callable[..., Any] | None = None
    variant: str = ""

    def __post_init__(self) -> None:
        if self.shares_pass:
            object.__setattr__(self, "evaluates_once", True)

    def __str__(self) -> str:
        return f"{self.name}, {self.variant}" if self.variant else self.name

    @property
    def name(self) -> str:
        return self.rule.__name__

    @property
    def shares_pass(self) -> bool:
        """Whether the classic loop, without a closure, is enough."""
        return getattr(self.rule, "shares_pass", False)

    @property
    def needs_backward(self) -> bool:
        """Whether it learns from a backward pass of the loss through the whole network."""
        families = bioopt.FeedbackRule | BlockRule | bioopt.EnergyRule | bioopt.DifferenceTargetPropagation
        return issubclass(self.rule, families)

    @property
    def regulates(self) -> bool:
        """Whether each step also scales weights and shifts biases, by homeostasis."""
        return self.rule is bioopt.Homeostasis or (self.takes("homeostasis") and self.options.get("homeostasis", True))

    @property
    def rescales(self) -> bool:
        """Whether steps are made along other quantities than the parameters themselves."""
        return bool(self.options.get("mu_pc"))

    @property
    def ordinary(self) -> bool:
        """Whether it trains whatever synapses there are, and needs no network of its own."""
        return self.cnn is cnn

    @cached_property
    def accepted(self) -> set[str]:
        return keywords(self.rule.__init__)

    def takes(self, option: str) -> bool:
        return option in self.accepted

    def taking(self, **options: Any) -> dict[str, Any]:
        """Those of the options that the rule has."""
        return {name: value for name, value in options.items() if self.takes(name)}

    @cached_property
    def takes_parameters(self) -> bool:
        """Whether it trains bare parameters; other rules need the module, to watch its layers."""
        try:
            self.make(self.mlp().parameters(), **self.taking(readout=None))
        except TypeError:
            return False
        return True

    def make(self, params: Any, lr: float = 0.01, **options: Any) -> Any:
        """Build the optimizer, without options of ``descent`` where the rule makes its step itself."""
        if not self.takes("descent") and self.build is None:
            options = {name: value for name, value in options.items() if name not in ("descent", "momentum")}
        options = {**self.options, **options}
        by_default = inspect.signature(self.rule).parameters.get("readout")
        if by_default is not None and options.get("readout", by_default.default) == "delta" and is_rate(lr):
            options.setdefault("readout_lr", lr)  # its own default is measured by tests of the readout
        if "momentum" in options:  # which Adam, the default of perturbation rules, does not have
            options = {"descent": torch.optim.SGD, **options}
        return (self.build or self.rule)(params, lr, **options)


class Published:
    """Local rules in their published form, without homeostasis, and with a readout of the same rate."""

    def __getattr__(self, name: str) -> Callable[..., Any]:
        rule = getattr(bioopt, name)

        def build(params: Any, lr: float = 0.01, **options: Any) -> Any:
            if options.get("readout", "delta") == "delta":
                options.setdefault("readout_lr", lr)
            return rule(params, lr, homeostasis=False, **options)

        return build


published = Published()
PUBLISHED = {"homeostasis": False}
CASES = [
    Case(bioopt.BCM, PUBLISHED),
    Case(bioopt.STDP, cnn=spiking_cnn, mlp=spiking_mlp),
    Case(bioopt.AntiHebbian, PUBLISHED),
    Case(bioopt.ContrastiveDivergence, cnn=machines, mlp=machine),
    Case(bioopt.DRTP, needs_target=True),
    Case(bioopt.DifferenceTargetPropagation, {"feedback_steps": 1}, chain=True),
    Case(bioopt.DirectFeedbackAlignment),
    Case(bioopt.DirectKolenPollack),
    Case(bioopt.DualPropagation, {"steps": 2}),
    Case(bioopt.EProp, {"feedback": "adaptive"}, cnn=current_cnn, mlp=spiking_mlp),
    Case(bioopt.EquilibriumPropagation, {"nudged_steps": 2}),
    Case(
        bioopt.EquilibriumPropagation,
        {"energy": "hopfield", "free_steps": 2, "nudged_steps": 2},
        cnn=averaging_cnn,
        variant="hopfield",
    ),
    Case(bioopt.FeedbackAlignment),
    Case(bioopt.ForwardForward, needs_target=True),
    Case(bioopt.ForwardGradient),
    Case(bioopt.Hebbian, PUBLISHED),
    Case(bioopt.Hebbian, {"readout_lr": None}, variant="by default"),
    Case(bioopt.HillClimbing, {"tries": 20}),  # one of 20 is nearly always kept
    Case(bioopt.Homeostasis),
    Case(bioopt.KolenPollack),
    Case(bioopt.KrotovHopfield, PUBLISHED),
    Case(bioopt.LocalContrastive, {"readout_lr": None}),
    Case(bioopt.LocalLoss, needs_target=True),
    Case(bioopt.LocalPerturbation, needs_target=True, evaluates_once=True),
    Case(bioopt.MonoForward, needs_target=True),
    Case(bioopt.MonoForward, {"readout": "delta"}, needs_target=True, variant="delta readout"),
    Case(bioopt.NodePerturbation),
    Case(bioopt.Oja, PUBLISHED),
    Case(bioopt.PredictiveCoding, {"steps": 2}),
    Case(bioopt.PredictiveCoding, {"steps": 3, "mode": "incremental"}, variant="incremental"),
    Case(bioopt.PredictiveCoding, {"steps": 1, "mode": "error"}, variant="error"),
    Case(bioopt.PredictiveCoding, {"steps": 2, "mu_pc": True}, variant="mu_pc"),
    Case(bioopt.RankOnePerturbation, perturbs_first=True),
    Case(bioopt.RewardHebbian, {"trials": 1, "sigma": 0.5}, evaluates_once=True, perturbs_first=True),
    Case(bioopt.RewardSTDP, cnn=spiking_cnn, mlp=spiking_mlp, evaluates_once=True),
    Case(bioopt.Sanger, PUBLISHED),
    Case(bioopt.SerialPerturbation, {"coordinates": 20}, perturbs_first=True),
    Case(bioopt.SignSymmetry),
    Case(bioopt.SignSymmetry, {"mode": "batchwise"}, variant="batchwise"),
    Case(bioopt.SoftHebb, {**PUBLISHED, "inverse_temperature": 1.0}),
    Case(bioopt.WeightMirror),
    Case(bioopt.WeightPerturbation, {"population": 4}, perturbs_first=True),
]
OF_RULE = {case.rule: case for case in CASES if not case.variant}
_first_of_family = {family_of(case.rule): case for case in reversed(CASES)}
#: for costly tests: all cases, of which the default suite runs the first of each family, and the long tests the others
BY_FAMILY = [
    case if case is _first_of_family[family_of(case.rule)] else pytest.param(case, marks=pytest.mark.long)
    for case in CASES
]
RULES = [
    rule
    for rule in (getattr(bioopt, name) for name in bioopt.__all__)
    if inspect.isclass(rule) and issubclass(rule, bioopt.LearningRule) and not inspect.isabstract(rule)
]
ONE_PASS = [case for case in CASES if case.shares_pass]
#: one pass, in which each layer but the readout learns from its own activity
LOCAL = [case for case in ONE_PASS if not case.needs_backward]
SEVERAL_PASSES = [case for case in CASES if not case.shares_pass]
ORDINARY = [case for case in CASES if case.ordinary]
#: those that take networks with skip connections and layers that run twice
ANY_GRAPH = [case for case in ORDINARY if not case.chain]


def mixed(model: nn.Sequential, lr: float = 0.01, descent: type = torch.optim.SGD, **options: Any) -> bioopt.Mixed:
    """Hebbian learning of the layers beneath, and torch's optimizer for those above."""
    rule = bioopt.Hebbian(model[:5], lr, readout=None, homeostasis=False, descent=descent, **options)
    return bioopt.Mixed(rule, descent(model[5:].parameters(), lr, **options))


MIXED = Case(bioopt.Mixed, build=mixed, evaluates_once=True)


def make(rule: type, params: Any, lr: float = 0.01, **options: Any) -> Any:
    """Build a rule with the options of its row."""
    return OF_RULE[rule].make(params, lr, **options)


def give_target(optimizer: Any, y: Tensor) -> None:
    """Set the target of those that need one."""
    for member in getattr(optimizer, "optimizers", [optimizer]):
        if type(member) in OF_RULE and OF_RULE[type(member)].needs_target:
            member.target = y


def batch(seed: int = 0, n: int = 10) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, 2, 8, 8, generator=generator), torch.randint(5, (n,), generator=generator)


def per_sample(optimizer: Any, model: nn.Module, x: Tensor, y: Tensor) -> Callable[[], Tensor]:
    """The better form of a closure."""

    def closure() -> Tensor:
        optimizer.zero_grad()
        give_target(optimizer, y)
        losses = F.cross_entropy(model(x), y, reduction="none")
        if losses.requires_grad:
            losses.mean().backward()
        return losses

    return closure


def ordinary(optimizer: Any, model: nn.Module, x: Tensor, y: Tensor) -> Callable[[], Tensor]:
    """torch's ordinary closure."""

    def closure() -> Tensor:
        optimizer.zero_grad()
        give_target(optimizer, y)
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        return loss

    return closure


def steps(optimizer: Any, model: nn.Module, count: int, first: int = 0) -> Any:
    loss = None
    for i in range(first, first + count):
        loss = optimizer.step(per_sample(optimizer, model, *batch(i)))
    return loss


def name_of(model: nn.Module, wanted: Tensor) -> str:
    return next(name for name, p in model.named_parameters() if p is wanted)


def weights(model: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in model.parameters()]


def directions(model: nn.Module) -> list[Tensor]:
    """The weight vectors of all neurons, with length 1: homeostasis leaves them as they are."""
    return [F.normalize(p.detach().flatten(1), dim=1) for p in model.parameters() if p.ndim > 1]


def same(left: list[Tensor], right: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


def hooks(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())
