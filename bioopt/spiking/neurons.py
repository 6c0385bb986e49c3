"""Finds the module with the spiking neurons that a layer drives."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeAlias

from torch import nn

from ..core.params import named_modules_of
from ..core.synapse import Synapse

#: name of a layer -> its neurons, as a module or by name
Neurons: TypeAlias = Mapping[str, str | nn.Module]


class NeuronFinder:
    """Finds the module with the neurons of each synapse."""

    def __init__(self, rule: str, named: Neurons | None) -> None:
        self.rule = rule
        self.named = dict(named or {})
        self.modules: dict[nn.Module, str] = {}  # all modules given, in registration order, with their names

    def find(self, synapses: list[Synapse], params: Any) -> None:
        """Set the neurons of a group's synapses; ``params``: the modules of the group."""
        for prefix, module in named_modules_of(params):
            for name, inner in module.named_modules(prefix=prefix):
                self.modules.setdefault(inner, name)
        layers = {synapse.layer for synapse in synapses}
        for synapse in synapses:
            synapse.neurons = self._named(synapse) if synapse.name in self.named else self._following(synapse, layers)

    def require_known(self, synapses: Any) -> None:
        """Raise if ``neurons`` names a layer that does not exist."""
        known = [synapse.name for synapse in synapses]
        for name in self.named:
            if name not in known:
                raise ValueError(f"{self.rule}: neurons={{{name!r}: ...}}: the layers are {', '.join(known)}")

    def _named(self, synapse: Synapse) -> nn.Module:
        given = self.named[synapse.name]
        if isinstance(given, nn.Module):
            return given
        for module, name in self.modules.items():
            if name == given:
                return module
        raise ValueError(
            f"{self.rule}: neurons={{{synapse.name!r}: {given!r}}}: there is no module of this name among those "
            "given; give the module itself"
        )

    def _following(self, synapse: Synapse, layers: set[nn.Module]) -> nn.Module:
        after = False
        for module in self.modules:
            if module is synapse.layer:
                after = True
            elif after and not type(module).__module__.startswith("torch.nn.") and layers.isdisjoint(module.modules()):
                return module
        raise ValueError(
            f"{self.rule}: layer '{synapse.name}' has no spiking neurons after it. Neurons are any module that is not "
            "of torch.nn and returns 0 or 1 for each output of the layer, such as snntorch.Leaky; if they are "
            f"elsewhere, name them: neurons={{'{synapse.name}': ...}}"
        )
