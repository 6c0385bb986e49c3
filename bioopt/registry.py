"""Rules by name, with tuned options.

The name, family and summary of a rule come from its class. Its presets are those of ``conf/optimizer/<name>.yaml``,
which ``scripts/generate.py`` writes to ``presets.json``.
"""

from __future__ import annotations

import difflib
import functools
import inspect
import json
import pkgutil
import re
from collections.abc import Iterable, Iterator, Mapping
from fnmatch import fnmatchcase
from importlib.resources import files
from typing import Any

from torch import nn

from .core.params import DescentOptions, Params
from .core.rule import LearningRule
from .core.synapse import survey

__all__ = ["create_optimizer", "family_of", "list_optimizers", "presets", "rule_classes", "rules", "summary_of"]


def create_optimizer(
    name: str,
    model: Params,
    preset: str | None = None,
    *,
    groups: Mapping[str, Mapping[str, Any]] | None = None,
    **options: Any,
) -> LearningRule:
    """Build a rule by name, optionally with tuned options.

    Args:
        name: as in `list_optimizers`, or the name of the class.
        model: ``params`` of the rule's class: the model, its parameters if the rule needs no layers, or groups.
        preset: ``"default"``, or a network of ``conf/model`` (``"cnn"``, ``"mlp"``, ...): start from the options of
            ``conf/optimizer/<name>.yaml`` for it, which `presets` lists. ``None``: the defaults of the class.
        groups: options for parts of the model, by module name, as in ``{"trunk.block2": {"lr": 0.005}}``. Each layer
            has those of all parts that it is in; of one given twice, the innermost counts.
        options: keywords of the class. They override the preset, in its groups too. ``readout=None`` also drops the
            preset's options of the readout, another ``descent`` those of the preset's descent.

    Raises:
        ValueError: an unknown name, preset or part of the model; the message lists the known ones.
        TypeError: groups without a model; the errors of the class, such as for a missing required option.

    Example::

        optimizer = bioopt.create_optimizer("hebbian", model, preset="cnn", lr=1.0)
    """
    name, rule = _find(name)
    if preset is not None:
        tuned = _without(options, _preset(name, preset), rule.renamed)
        of_preset = tuned.pop("groups", None)
        groups = of_preset if groups is None else groups
        options = tuned | options
    return rule(in_groups(model, groups) if groups else model, **options)


def list_optimizers(family: str | None = None, filter: str | None = None) -> list[str]:
    """The names of rules, for `create_optimizer`.

    Args:
        family: only those of one family: ``"hebbian"``, ``"perturbation"``, ...
        filter: only those that match a pattern, such as ``"*reward*"``.

    Raises:
        ValueError: an unknown family; the message lists the known ones.
    """
    families = sorted({family_of(rule) for rule in rule_classes()})
    if family is not None and family not in families:
        raise ValueError(f"family={family!r} must be one of {_listed(families)}{_nearest(family, families)}")
    return [
        name
        for name, rule in rules().items()
        if family in (None, family_of(rule)) and (filter is None or fnmatchcase(name, filter))
    ]


def presets(name: str) -> dict[str, dict[str, Any]]:
    """The tuned options of a rule, as keywords of `create_optimizer`.

    The learning rates were tuned for the cosine schedule of ``train.py`` unless ``conf/optimizer/<name>.yaml`` has
    another.

    Returns:
        ``"default"``, and networks of ``conf/model`` with other options.

    Example::

        >>> bioopt.presets("hebbian")["mlp"]["inverse_temperature"]
        0.1
    """
    tuned: dict[str, dict[str, Any]] = json.loads(_tables())["rules"].get(_find(name)[0], {})
    for options in tuned.values():
        if "descent" in options:
            options["descent"] = pkgutil.resolve_name(options["descent"])
    return tuned


def rules() -> dict[str, type[LearningRule]]:
    """The classes of all rules by name, in alphabetical order."""
    spelled = {_plain(name): name for name in json.loads(_tables())["rules"]}  # SoftHebb is softhebb there
    named = {spelled.get(_plain(rule.__name__)) or _snake_case(rule.__name__): rule for rule in rule_classes()}
    return dict(sorted(named.items()))


def rule_classes() -> list[type[LearningRule]]:
    """The classes of all rules of bioopt."""
    return [
        rule
        for rule in dict.fromkeys(_subclasses(LearningRule))
        if rule.__module__.startswith("bioopt.") and not inspect.isabstract(rule)
    ]


def family_of(rule: type[LearningRule]) -> str:
    """The package of a rule inside bioopt."""
    return rule.__module__.split(".")[1]


def summary_of(rule: type[LearningRule]) -> str:
    """The first line of a rule's docstring."""
    return (inspect.getdoc(rule) or "").partition("\n")[0]


def _find(name: str) -> tuple[str, type[LearningRule]]:
    if not isinstance(name, str):
        raise TypeError(f"the name of an optimizer must be a string such as 'hebbian', not a {type(name).__name__}")
    known = rules()
    for spelled, rule in known.items():
        if _plain(name) == _plain(spelled):
            return spelled, rule
    nearest = _nearest(name, known)
    raise ValueError(
        f"there is no optimizer {name!r}{nearest or f'; there are {_listed(known)}'}"
        f"{' bioopt.list_optimizers() lists all' if nearest else ''}"
    )


def _preset(name: str, preset: str) -> dict[str, Any]:
    """The options of a preset; networks without their own have the default's."""
    tuned = presets(name)
    known = [*tuned, *(network for network in json.loads(_tables())["networks"] if network not in tuned)]
    if not tuned or preset not in known:
        choices = (
            f"must be one of {_listed(known)}{_nearest(preset, known)}" if tuned else "does not exist: it has none"
        )
        raise ValueError(f"{name}: preset={preset!r} {choices}")
    return tuned.get(preset, tuned["default"])


def _without(options: Mapping[str, Any], tuned: dict[str, Any], renamed: Mapping[str, str]) -> dict[str, Any]:
    """A preset without the options that are replaced or no longer apply."""
    left_out = {renamed.get(option, option) for option in options}
    if "readout" in options and options["readout"] is None:
        left_out |= {option for option in tuned if option.startswith("readout_")}
    if "descent" in options:
        left_out |= DescentOptions.__annotations__.keys()
    kept = {option: value for option, value in tuned.items() if option not in left_out}
    if "groups" in tuned:
        kept["groups"] = {
            part: {option: value for option, value in own.items() if option not in left_out}
            for part, own in tuned["groups"].items()
        }
    return kept


def _inside(name: str, part: str) -> bool:
    return f"{name}.".startswith(f"{part}.")


def in_groups(model: Params, groups: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Param groups of a model: each layer is in that of the innermost part with options.

    An option that a part does not have is that of the part around it.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"options for parts ({_listed(groups)}) need the model itself, not its parameters or groups")
    layers = dict(model.named_modules())
    for part in groups:
        if part not in layers:
            raise ValueError(
                f"there are options for {part!r}, which is not a part of the model{_nearest(part, layers) or '.'} "
                "Name the parts in groups={...}, or use preset='default'"
            )
    options = {
        part: {k: v for outer in sorted(groups, key=len) if _inside(part, outer) for k, v in groups[outer].items()}
        for part in groups
    }
    nearest = {
        layer: max((part for part in groups if _inside(name, part)), key=len, default="")
        for name, layer in layers.items()
    }
    order = {synapse.layer: i for i, synapse in enumerate(survey(model)[0])}
    found: dict[str, dict[str, Any]] = {}
    last: dict[str, int] = {}
    placed: set[nn.Module] = set()
    for name, layer in layers.items():
        if layer in placed or not [*layer.parameters(recurse=False)]:
            continue
        part = nearest[layer]
        if any(nearest[inner] != part for inner in layer.modules()):
            raise ValueError(
                f"{name!r} of type {type(layer).__name__} has parameters besides those of the layers inside it, so it "
                "cannot be split: give options for all of it, or give param groups in place of the model"
            )
        placed |= {*layer.modules()}
        found.setdefault(part, {"params": [], **options.get(part, {})})["params"].append((name, layer))
        last[part] = max([last.get(part, -1), *(order[inner] for inner in layer.modules() if inner in order)])
    # The last layer stays last, where a rule looks for its readout.
    return [found[part] for part in sorted(found, key=last.__getitem__)]


@functools.cache
def _tables() -> str:
    """``presets.json`` as text: each caller parses it, and may change the result."""
    return (files("bioopt") / "presets.json").read_text(encoding="utf-8")


def _subclasses(rule: type[Any]) -> Iterator[type[LearningRule]]:
    for subclass in rule.__subclasses__():
        yield subclass
        yield from _subclasses(subclass)


def _snake_case(name: str) -> str:
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", name).lower()


def _plain(name: str) -> str:
    return name.replace("_", "").lower()


def _nearest(name: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(name.lower(), [*known], 1)
    return f"; did you mean {near[0]!r}?" if near else ""


def _listed(names: Iterable[str]) -> str:
    return ", ".join(map(repr, names))
