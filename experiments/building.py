"""Networks, costs, optimizers and schedules, built from a configuration."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from hydra.errors import InstantiationException
from hydra.utils import get_object, instantiate
from omegaconf import DictConfig, OmegaConf
from torch import nn

import bioopt
from bioopt import find_synapses
from bioopt.costs import Cost, CrossEntropy
from bioopt.registry import in_groups

from . import data
from .checks import unknown
from .config import by_part
from .learner import Block, Learner
from .options import OF_TASKS

COSTS, OPTIMIZERS = (Path(__file__).parent.parent / "conf" / group for group in ("cost", "optimizer"))
READOUT_LR = 0.02  # of a block that is a readout alone, unless readout_lr is given
# Of an optimizer's options, those that are not keywords of its class.
NOT_KEYWORDS = {"name", "per_data", "per_model", "requires", "schedule"}


def instantiated(option: str, spec: Any, *args: Any, **options: Any) -> Any:
    """An object of ``_target_``; an error names the option that set it."""
    try:
        return instantiate(spec, *args, **{"_convert_": "all", **options})
    except InstantiationException as error:
        raise ValueError(f"{option}: {error.__cause__ or error}") from error


def check_keywords(config: DictConfig) -> None:
    """Refuse options that are not keywords of the ``_target_`` that they are given to."""
    plain = OmegaConf.to_container(config, resolve=True)
    assert isinstance(plain, dict)
    given = {key: plain.get(key) for key in ("optimizer", "model", "task", "final_analysis")}
    given["readout.optimizer"] = plain["readout"]["optimizer"]
    for part in OF_TASKS:
        given |= {f"{part}.{name}": spec for name, spec in (plain.get(part) or {}).items()}
    for option, spec in given.items():
        if isinstance(spec, dict) and "_target_" in spec:
            own = NOT_KEYWORDS if option.startswith(("optimizer", "rules")) else {"name"}
            _check_keywords(option, spec["_target_"], [str(key) for key in spec if key not in own])


def _check_keywords(option: str, target: str, given: list[str]) -> None:
    try:
        found = get_object(target)
    except Exception:  # `instantiate` will report it
        return
    known: set[str] = {*getattr(found, "regulated", ())}  # options that LocalRule takes for its subclasses
    # A class passes its **options on to the next in its MRO, and a rule at last to its `descent`.
    chain: list[Any] = (
        [vars(c)["__init__"] for c in found.__mro__ if "__init__" in vars(c)] if isinstance(found, type) else [found]
    )
    while chain:
        parameters = {**inspect.signature(chain.pop(0)).parameters}
        known |= {p.name for p in parameters.values() if p.kind in (p.KEYWORD_ONLY, p.POSITIONAL_OR_KEYWORD)}
        if all(parameter.kind is not parameter.VAR_KEYWORD for parameter in parameters.values()):
            break
        if "descent" in parameters:
            chain = [parameters["descent"].default]
        if not chain or "descent" in given:
            return  # which keywords it takes is not known here
    for name in given:
        if name not in known and name not in ("_target_", "_partial_", "_args_", "_convert_", "_recursive_"):
            raise unknown(f"{option}.{name}", [f"{option}.{other}" for other in sorted(known - {"self"})])


def build_model(config: DictConfig, images: data.Images) -> nn.Module:
    """The network of ``model=``, for the shape and classes of the data."""
    options = {k: v for k, v in config.model.items() if k != "name"}
    model: nn.Module = instantiated(f"model={config.model.name}", options, shape=images.shape, classes=images.classes)
    return model.to(memory_format=torch.channels_last)  # convolutions take half the time


def freeze(model: nn.Module, parts: Sequence[str | int]) -> None:
    """Freeze these parts of the model, by their names, at their random start."""
    if isinstance(parts, str | int):
        raise ValueError(f"frozen={parts} must be a list of parts, such as [{parts}]")
    for part in map(str, parts):
        try:
            model.get_submodule(part).requires_grad_(False)
        except AttributeError:
            names = ", ".join(name for name, _ in model.named_children())
            raise ValueError(f"frozen={part} is not a part of the model; it has {names}") from None


def build_cost(spec: Any, option: str = "cost") -> Cost:
    """A cost by its name in ``conf/cost``, with options or without; or one of the user's own, by ``_target_``."""
    given = {"name": spec} if isinstance(spec, str) else OmegaConf.to_container(OmegaConf.create(spec), resolve=True)
    options = {str(key): value for key, value in given.items()} if isinstance(given, dict) else {}
    name, path = options.get("name"), COSTS / f"{options.get('name')}.yaml"
    if path.exists():
        options = {str(key): value for key, value in OmegaConf.load(path).items()} | options
    elif "_target_" not in options:
        known = ", ".join(sorted(file.stem for file in COSTS.glob("*.yaml")))
        raise ValueError(f"{option}={spec} is not a cost, or lacks its name; there are {known}")
    kept = {key: value for key, value in options.items() if key not in ("name", "blocks")}
    if name == "mixture":
        if not isinstance(kept["weights"], dict):
            raise ValueError(
                f"{option}.weights={kept['weights']} must give the weight of each cost, as in "
                "'{cross_entropy: 1, sparsity: 0.1}'"
            )
        kept["costs"] = {part: build_cost(part, f"{option}.weights") for part in kept["weights"]}
    try:
        cost: Cost = instantiate(kept, _convert_="all", _recursive_=False)
    except Exception as error:
        raise ValueError(f"{option}={name}: {error.__cause__ or error}") from error
    return cost


def final_analysis(config: DictConfig) -> Callable[..., Any] | None:
    """The function of ``final_analysis``, if there is one.

    Raises:
        ValueError: there is no such function.
    """
    spec = config.get("final_analysis")
    if spec is None:
        return None
    analyse: Callable[..., Any] = instantiated("final_analysis", spec, _convert_="none")
    if not callable(analyse):
        raise ValueError(
            f"final_analysis={spec}: it gives a {type(analyse).__name__}, not a function of the model; where _target_ "
            "is that function, write _partial_: true"
        )
    return analyse


def build_optimizer(
    config: DictConfig, model: nn.Module, group: dist.ProcessGroup | None = None, whole: nn.Module | None = None
) -> torch.optim.Optimizer:
    """The optimizer of ``optimizer=``: rules get the model or its parts, plain torch optimizers their parameters.

    Args:
        config: of the run.
        model: to be trained.
        group: of the processes that share the run, if there are several.
        whole: the network of which ``model`` is a block, where options of parts may belong to other blocks.
    """
    options = {k: v for k, v in config.optimizer.items() if k not in NOT_KEYWORDS}
    if options.get("readout", "") is None:  # then it has no options; those of the file are for one
        path = OPTIMIZERS / f"{config.optimizer.name}.yaml"
        usual: Any = OmegaConf.load(path) if path.exists() else {}
        options = {k: v for k, v in options.items() if not k.startswith("readout_") or v != usual.get(k)}
    make = instantiate(options, _partial_=True, _convert_="all")
    parts = OmegaConf.to_container(config.optimizer.get("per_model", {}).get(config.model.name, OmegaConf.create()))
    try:
        is_class = isinstance(make.func, type)  # or a function that takes the model, as the random trunk is
        rule = is_class and issubclass(make.func, bioopt.LearningRule)
        if group is not None and not rule:
            raise ValueError("it cannot share a run with other ranks; run it without torchrun")
        shared = {"process_group": group} if group is not None else {}
        by_part = groups(model, parts, whole or model)
        local = is_class and issubclass(make.func, bioopt.LocalRule) and make.keywords.get("readout", "delta")
        if whole is not None and rule and not issubclass(make.func, bioopt.LocalRule) and "readout" in make.keywords:
            make.keywords["readout"] = None  # every layer of a block can learn from its cost by the rule
        if whole is not None and local == "delta" and len(find_synapses(model)) == 1:
            # The block is a readout alone; it learns by its local error, as the readout of a whole network does.
            rate = make.keywords.get("readout_lr")
            rate = READOUT_LR if rate is None else rate
            return torch.optim.SGD(model.parameters(), lr=rate, **(make.keywords.get("readout_options") or {}))
        given = by_part if rule else parameters(by_part) if is_class else model
        optimizer: torch.optim.Optimizer = make(given, **shared)
    except (TypeError, ValueError) as error:
        required = config.optimizer.get("requires", {}).items()
        lacking = [f"{k.removesuffix('.name')}={v}" for k, v in required if OmegaConf.select(config, k) != v]
        way_out = f". It requires {' '.join(lacking)}" if lacking else ""
        raise ValueError(f"optimizer={config.optimizer.name}: {error}{way_out}") from error
    return optimizer


def with_rule(config: DictConfig, rule: str, **options: Any) -> DictConfig:
    """The run with one of its ``rules`` as its optimizer, and with those of these options that the rule has."""
    run = config.copy()
    OmegaConf.set_struct(run, False)
    run.optimizer = OmegaConf.to_container(config.rules[rule], resolve=True)
    run.optimizer.update({key: value for key, value in options.items() if key in run.optimizer})
    return run


def build_learner(run: DictConfig, model: nn.Module, name: str, of: str, schedule_steps: int = 0) -> Learner:
    """A learner of a whole network by cross-entropy, with the optimizer of a run.

    Args:
        run: the run; see `with_rule`.
        model: the network.
        name: of the learner in error messages.
        of: the option that holds its learning rate, as ``rules.sgd``, in error messages.
        schedule_steps: over which the run's schedule changes the learning rate; 0: it stays constant.
    """
    optimizer = build_optimizer(run, model)
    scheduler = build_schedule(run.schedule, optimizer, schedule_steps) if schedule_steps else None
    block = Block(model, CrossEntropy(), optimizer, scheduler)
    return Learner(model, [block], name=name, rate=rate_of(run, optimizer, of))


def rate_of(run: DictConfig, optimizer: torch.optim.Optimizer, of: str = "optimizer") -> str:
    """The option of the learning rate for messages, as ``optimizer.lr=0.1``; without a value, the optimizer's own."""
    rate = run.optimizer.lr
    if rate is None:
        rate = max(group["lr"] for group in optimizer.param_groups)
    return f"{of}.lr={rate}"


def groups(model: nn.Module, parts: Any, whole: nn.Module) -> Any:
    """The model, or groups of its modules where there are options for parts; those of an inner part go first."""
    parts = by_part(parts or {})
    present = dict(model.named_modules())
    for name in parts:
        if name not in dict(whole.named_modules()):
            raise ValueError(f"per_model has options for '{name}', which is not a part of the model")
    parts = {name: own for name, own in parts.items() if name in present}
    return in_groups(model, parts) if parts else model


def parameters(given: Any) -> list[dict[str, Any]]:
    """The parameters of a model, or of groups of its parts, as the param groups of a plain torch optimizer."""
    modules = given if isinstance(given, list) else [{"params": [("", given)]}]
    seen: set[nn.Parameter] = set()
    result = []
    for group in modules:
        found = [p for _, module in group["params"] for p in module.parameters() if p not in seen]
        seen |= set(found)
        result.append({**group, "params": found})
    return result


def build_schedule(
    name: str, optimizer: torch.optim.Optimizer, total: int
) -> torch.optim.lr_scheduler.LRScheduler | None:
    """The learning rate over ``total`` steps, by ``cosine``, ``constant`` or ``halving``."""
    if name == "constant":
        return None
    if name == "halving":
        at = [int(total * fraction) for fraction in (0.2, 0.35, 0.5, 0.6, 0.7, 0.8, 0.9)]
        return torch.optim.lr_scheduler.MultiStepLR(optimizer, at, gamma=0.5)
    return torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(total, 1))
