"""Modules that belong to the optimizer, not to the model: local heads, learned inverses, learned feedback weights."""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from .noise import mixed

OWNED = "owned"  # in a rule's own state: the values of its modules


class Owned:
    """The modules of a rule, by name.

    Lazy modules (`torch.nn.LazyLinear`) get their sizes from their first call, or from a loaded state.

    Args:
        seed: fixes, with their names, the initial values of lazy modules.
    """

    def __init__(self, seed: int = 0) -> None:
        self.seed = seed
        self.modules = nn.ModuleDict()

    def add(self, rule: str, modules: Mapping[str, nn.Module]) -> list[tuple[str, Tensor]]:
        """Add modules; return their parameters with the names for a param group.

        Raises:
            ValueError: a name that is taken.
        """
        keys = {name: _key(name) for name in modules}
        for name, key in keys.items():
            if key in self.modules:
                raise ValueError(f"{rule}: there is a module of the rule's own named '{name}' already")
        self.modules.update({keys[name]: module for name, module in modules.items()})
        return [(f"{OWNED}.{n}.{inner}", p) for n, m in modules.items() for inner, p in m.named_parameters()]

    def __getitem__(self, name: str) -> nn.Module:
        """A module by its name."""
        return self.modules[_key(name)]

    def __call__(self, name: str, *args: Any) -> Any:
        """Call a module; the first call of a lazy one draws its values, without touching torch's global generators."""
        module = self[name]
        if not any(is_lazy(p) for p in module.parameters()):
            return module(*args)
        with torch.random.fork_rng([t.device for t in args if isinstance(t, Tensor) and t.is_cuda]):
            torch.manual_seed(mixed(self.seed, zlib.crc32(name.encode())))
            return module(*args)

    def state_dict(self) -> dict[str, Tensor]:
        """Copies of all values, without those of lazy modules that have none yet."""
        return {name: p.detach().clone() for name, p in self.modules.state_dict().items() if not is_lazy(p)}

    def require_own(self, rule: str, state: dict[str, Tensor]) -> None:
        """Raise if a loaded state has modules of other names or sizes."""
        own = self.modules.state_dict()
        strange = [n for n, p in state.items() if n not in own or (not is_lazy(own[n]) and own[n].shape != p.shape)]
        lacking = [n for n, p in own.items() if n not in state and not is_lazy(p)]
        if strange or lacking:
            raise ValueError(
                f"{rule}: the loaded state has modules of its own other than these "
                f"(look at {', '.join([*strange, *lacking])}): build the optimizer as it was built then"
            )

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Load the result of `state_dict`; lazy modules get their sizes from it."""
        self.modules.load_state_dict(state, strict=False)


def _key(name: str) -> str:
    """A name without dots, which torch reserves for nested modules."""
    return name.replace(".", "/")
