"""`Coverage`: which parameters a rule trains, and why it does not train the others."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

from ._torch_private import own_parameters
from .errors import warn
from .recorder import COMPILED, Recorder
from .synapse import Exclusion, Synapse, is_known

UNFROZEN = "it was frozen when the optimizer was built: optimizer.add_param_group({'params': layer}), or a new one"


class Coverage:
    """The modules given to a rule, and changes of their layers since.

    Args:
        rule: its name.
        recorder: of the rule.
        excluded: modules and parameters to leave out.
    """

    def __init__(self, rule: str, recorder: Recorder, excluded: Exclusion) -> None:
        self._rule, self._recorder, self._excluded = rule, recorder, excluded
        self._modules: list[tuple[str, nn.Module]] = []
        self._homes: dict[Tensor, tuple[nn.Module, str, str]] = {}  # the layer of each parameter, and its names
        self._once_frozen: list[tuple[str, nn.Module]] = []  # layers that were frozen when given
        self._silent: dict[Synapse, str] = {}  # layers that learn nothing -> the reason
        self._unfrozen: set[nn.Module] = set()  # layers of `_once_frozen` that were warned of
        self._checked: tuple[Any, ...] = ()
        self._absent: set[Synapse] = set()  # layers that did not fire in the last step and were checked
        self._warned_of: set[Synapse] = set()

    def add(self, modules: list[tuple[str, nn.Module]], params: Iterable[Tensor], watched: bool) -> None:
        """Add the modules of a group.

        Args:
            modules: with the prefixes of their names.
            params: those that the group trains.
            watched: whether their layers learn from their activity.
        """
        known, mine = self._inside(), set(params)
        self._modules += [(prefix, module) for prefix, module in modules if module not in known]
        for prefix, module in modules:
            for name, layer in module.named_modules(prefix=prefix):
                for attribute, p in own_parameters(layer).items():
                    if p is not None and p in mine:
                        self._homes.setdefault(p, (layer, attribute, ".".join(filter(None, (name, attribute)))))
                if watched and is_known(layer) and not layer.weight.requires_grad:
                    self._once_frozen.append((name, layer))

    def names(self, groups: list[dict[str, Any]]) -> dict[Tensor, str]:
        """The name of each parameter of the groups and of the given modules."""
        names: dict[Tensor, str] = {}
        for i, group in enumerate(groups):
            for j, p in enumerate(group["params"]):
                names[p] = group["param_names"][j] if "param_names" in group else f"group{i}.params[{j}]"
        many = len({id(m) for _, m in self._modules}) > 1
        for i, (prefix, module) in enumerate(self._modules):
            inside = module.named_parameters(f"group{i}" if many and not prefix else prefix)
            names |= {p: name for name, p in inside}
        return names

    def labels(self, groups: list[dict[str, Any]]) -> dict[Tensor, str]:
        """The rule that trains each parameter, or why it is not trained."""
        labels: dict[Tensor, str] = {}
        for group in groups:
            label = self._rule + (f" readout ({group['readout']})" if group.get("readout") else "")
            labels |= {p: label if p.requires_grad else "frozen" for p in group["params"]}
        for synapse, reason in self._silent.items():
            labels |= dict.fromkeys(synapse.parameters(), f"silent: {reason}")
        for _, layer in self._once_frozen:
            if layer not in self._recorder.synapses:
                own = [p for p in layer.parameters(False) if p.requires_grad and p not in labels]
                labels |= dict.fromkeys(own, f"silent: {UNFROZEN}")
        return labels | dict.fromkeys(self._excluded.params, "excluded")

    def require_same_parameters(self) -> None:
        """Raise if a layer no longer has the parameter that it had when the optimizer was built."""
        for p, (layer, attribute, name) in self._homes.items():
            own = own_parameters(layer)
            if own.get(attribute) is p:
                continue
            if layer not in self._recorder.synapses and any(q is p for q in layer.parameters()):
                continue  # pruned or parametrized: the original parameter still learns
            places = (place for prefix, m in self._modules for place, q in m.named_modules(prefix=prefix) if q is layer)
            if place := next(places, ""):  # in the model, where its group was given the layer alone
                name = f"{place}.{attribute}"
            how, remedy = "replaced", "Build the optimizer after the model has its parameters (to_empty gives new ones)"
            if f"{attribute}_orig" in own or hasattr(layer, "parametrizations"):
                how = "pruned, parametrized or normalised"
                remedy = f"Undo that, or build the optimizer after it with exclude=['{name.rpartition('.')[0]}']"
            raise RuntimeError(
                f"{self._rule}: parameter '{name}' was {how} after the optimizer was built, so that the layer "
                f"no longer uses the one that is trained. {remedy}"
            )

    def none_fired(self) -> str:
        """The message that no layer has fired, with the likely reason."""
        synapses, inside = list(self._recorder.synapses.values()), self._inside()
        if synapses and not any(s.layer in inside for s in synapses):
            why = "its layers were replaced in the model after the optimizer was built: build a new optimizer"
        elif synapses and not any(s.weight.requires_grad for s in synapses):
            why = "its layers were frozen after the optimizer was built (adapters do that): build a new optimizer"
        else:
            why = f"run the model in training mode (model.train()) before step(), or in the closure; {COMPILED}"
        return f"{self._rule}: no synapse has fired since the last step; {why}"

    def look_for_silent(self) -> None:
        """Warn once of layers that learn nothing, and again when one is frozen, unfrozen or changes its mode."""
        fired, synapses = self._recorder.fired, list(self._recorder.synapses.values())
        if not fired:  # this step needed no layer to fire
            return
        for synapse in [s for s in self._silent if s in fired]:
            del self._silent[synapse]
        absent = [s for s in synapses if s not in fired and s not in self._silent and s not in self._absent]
        self._absent = {s for s in (*self._absent, *absent) if s not in fired}
        now = (
            *((s.weight.requires_grad, s.layer.training) for s in synapses),
            *(layer.weight.requires_grad for _, layer in self._once_frozen),
        )
        if now == self._checked and not absent:
            return
        only_replaced, self._checked = now == self._checked, now
        inside = self._inside()
        found: list[str] = []
        for s in synapses:
            if s in fired or s in self._silent or not s.weight.requires_grad:
                continue
            if only_replaced and s.layer in inside:  # it may fire in another step
                continue
            if s.layer not in inside:
                reason = "it was replaced in the model after the optimizer was built: build a new optimizer"
            elif not s.layer.training:
                reason = "it is in evaluation mode: call train()"
            else:
                reason = "it did not run, or something else used its weight without calling it"
            self._silent[s] = reason
            if s.layer.training and s in self._warned_of:
                continue
            self._warned_of.add(s)
            found.append(f"'{s.name}' ({reason})")
        for name, layer in self._once_frozen:
            unfrozen = layer.weight.requires_grad and layer not in self._recorder.synapses and layer in inside
            if unfrozen and layer not in self._unfrozen:
                self._unfrozen.add(layer)
                found.append(f"'{name}' ({UNFROZEN})")
        if found:
            warn(
                f"{self._rule}: did not fire and learn nothing: {', '.join(found)}. exclude=[...] leaves "
                "layers out without this warning"
            )

    def _inside(self) -> set[nn.Module]:
        """All modules now inside those given."""
        return {inner for _, module in self._modules for inner in module.modules()}
