"""`Synapse`: a layer ``u = W x + b`` that rules watch; which layers of a model are synapses."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils.parametrize import is_parametrized

from ._torch_private import convolution_input_gradient

__all__ = ["Synapse", "find_synapses", "register_synapse"]

#: ``(layer, weight, g, x_shape) -> Jᵀg``, where J is the Jacobian of the layer with this weight
Transpose: TypeAlias = Callable[[nn.Module, Tensor, Tensor, torch.Size], Tensor]


class _Kind(NamedTuple):
    channel_dim: int  # the dimension of the neurons in the output, counted from the end
    transpose: Transpose | None = None


# By exact type: a subclass may bypass its hooks (`MultiheadAttention.out_proj`) or compute something else.
_KINDS: dict[type[nn.Module], _Kind] = {
    nn.Linear: _Kind(-1),
    nn.Conv1d: _Kind(-2),
    nn.Conv2d: _Kind(-3),
    nn.Conv3d: _Kind(-4),
}
BUILT_IN = tuple(_KINDS)
_CONVOLVE: dict[type[nn.Module], Callable[..., Tensor]] = {
    nn.Conv1d: F.conv1d,
    nn.Conv2d: F.conv2d,
    nn.Conv3d: F.conv3d,
}


def register_synapse(layer_type: type[nn.Module], channel_dim: int, transpose: Transpose | None = None) -> None:
    """Make every rule treat layers of exactly this type as synapses.

    The layer must take one tensor and return ``u = W x + b``: affine in its parameter ``weight``, whose first dimension
    is that of the postsynaptic neurons, and in ``bias``, if it has one.

    Args:
        layer_type: the class; subclasses are not included.
        channel_dim: the dimension of the neurons in the output, counted from the end (``nn.Linear``: -1,
            ``nn.Conv2d``: -3), so that a missing batch dimension does not matter.
        transpose: ``transpose(layer, weight, g, x_shape)``, the gradient at the input of a layer with this ``weight``
            for the gradient ``g`` at its output; by default autograd computes it with a forward pass.

    Raises:
        ValueError: if ``channel_dim`` is not negative.

    Example::

        class MaskedLinear(nn.Linear): ...
        bioopt.register_synapse(MaskedLinear, channel_dim=-1)
    """
    if channel_dim >= 0:
        raise ValueError(
            f"register_synapse({layer_type.__name__}): channel_dim={channel_dim} must be negative, counted from the end"
        )
    _KINDS[layer_type] = _Kind(channel_dim, transpose)


def is_known(layer: nn.Module) -> bool:
    """Whether rules watch layers of this type, and the weight is a parameter."""
    return type(layer) in _KINDS and isinstance(layer.weight, nn.Parameter)


@dataclass(eq=False)
class Synapse:
    """One watched layer.

    Attributes:
        name: of the layer in the model.
        layer: the module.
        channel_dim: the dimension of the neurons in its output, counted from the end.
        group: the index of its param group.
        index: its position among the watched layers.
        is_readout: whether it learns from the loss, by gradients.
        fixed_bias: whether its bias was excluded by name.
        neurons: the module that turns its output into spikes, for spiking rules.
    """

    name: str
    layer: nn.Module
    channel_dim: int
    group: int = -1
    index: int = -1
    is_readout: bool = False
    fixed_bias: bool = False
    neurons: nn.Module | None = None

    @property
    def weight(self) -> nn.Parameter:
        """The synaptic weights, first dimension postsynaptic."""
        return self.layer.weight  # type: ignore[return-value]

    @property
    def bias(self) -> nn.Parameter | None:
        """The neurons' bias, if they have one."""
        return getattr(self.layer, "bias", None)

    @property
    def pools(self) -> int:
        """The number of separate pools of neurons (``groups`` of a convolution)."""
        return getattr(self.layer, "groups", 1)

    @property
    def free_bias(self) -> nn.Parameter | None:
        """The bias of each neuron, unless it is missing, frozen or excluded."""
        bias = self.bias
        return bias if bias is not None and bias.requires_grad and not self.fixed_bias else None

    def named_parameters(self) -> list[tuple[str, nn.Parameter]]:
        """Weight and bias, without those that are missing, frozen or excluded."""
        both = [(f"{self.name}.weight", self.weight), (f"{self.name}.bias", self.free_bias)]
        return [(name, p) for name, p in both if p is not None and p.requires_grad]

    def parameters(self) -> list[nn.Parameter]:
        """`named_parameters`, without their names."""
        return [p for _, p in self.named_parameters()]

    def samples(self, u: Tensor) -> int:
        """The number of samples in an activity; 1 if it has no dimension for them."""
        return len(u) if u.ndim > -self.channel_dim else 1

    def transpose(self, weight: Tensor, g: Tensor, x_shape: torch.Size) -> Tensor:
        """The gradient at the layer's input for the gradient ``g`` at its output, with ``weight`` as its weight.

        For a Linear layer this is ``g @ weight``; for a convolution, the transposed convolution. With the layer's own
        weight it equals autograd's, bit for bit.

        Args:
            weight: of the shape of the layer's weight.
            g: of the shape of the layer's output.
            x_shape: the shape of the input.
        """
        layer: Any = self.layer
        kind, weight = type(layer), weight.detach()
        custom = _KINDS[kind].transpose if kind in _KINDS else None
        if custom is not None:
            return custom(layer, weight, g, x_shape)
        if kind in BUILT_IN:
            weight = weight.to(g.dtype)
        if kind is nn.Linear:
            return g @ weight
        if kind in _CONVOLVE and layer.padding_mode == "zeros" and not isinstance(layer.padding, str):
            if len(x_shape) < weight.ndim:  # a single image without a batch dimension
                return self.transpose(weight, g.unsqueeze(0), torch.Size([1, *x_shape])).squeeze(0)
            return convolution_input_gradient(
                g, x_shape, weight, layer.stride, layer.padding, layer.dilation, layer.groups
            )
        with torch.enable_grad(), torch.autocast(g.device.type, enabled=False):
            # W x + b has the same Jacobian everywhere.
            x = torch.zeros(x_shape, dtype=weight.dtype, device=g.device, requires_grad=True)
            if kind in _CONVOLVE:
                u = convolve(layer, x, weight)
            else:
                u = torch.func.functional_call(Unhooked(layer), {"layer.weight": weight}, (x,))
            (gradient,) = torch.autograd.grad(u, x, g.to(u.dtype))
        return gradient.to(g.dtype)


def padding_of(layer: Any) -> list[tuple[int, int]]:
    """The padding of a convolution before and after each spatial dimension."""
    if layer.padding == "valid":
        return [(0, 0)] * len(layer.kernel_size)
    if layer.padding == "same":
        widths = [d * (size - 1) for d, size in zip(layer.dilation, layer.kernel_size, strict=True)]
        return [(width // 2, width - width // 2) for width in widths]
    return [(width, width) for width in layer.padding]


def positions_of(layer: Any, sizes: Iterable[int]) -> list[int]:
    """The size of a convolution's output in each spatial dimension, for that of its input."""
    places = zip(sizes, padding_of(layer), layer.kernel_size, layer.stride, layer.dilation, strict=True)
    return [(n + sum(pad) - dilation * (size - 1) - 1) // stride + 1 for n, pad, size, stride, dilation in places]


def padded(layer: Any, x: Tensor) -> Tensor:
    """The input of a convolution, padded."""
    widths = [width for pair in reversed(padding_of(layer)) for width in pair]
    return F.pad(x, widths, mode="constant" if layer.padding_mode == "zeros" else layer.padding_mode)


def convolve(layer: Any, x: Tensor, weight: Tensor, groups: int | None = None) -> Tensor:
    """The output of a convolution with another weight, or other groups, and without a bias."""
    padding: Any = layer.padding
    if layer.padding_mode != "zeros":
        x, padding = padded(layer, x), 0
    function = _CONVOLVE[type(layer)]
    return function(x, weight, None, layer.stride, padding, layer.dilation, layer.groups if groups is None else groups)


UNKNOWN = "not a known synapse"
LAZY = "it has no size yet: call model(x) once before the optimizer is built"
PARAMETRIZED = (
    "its parameters are computed from others at each pass; undo that with "
    "torch.nn.utils.parametrize.remove_parametrizations(layer, 'weight')"
)
FUSED = (
    "it does not show its synapses: in its place, call nn.Linear layers for the input and for the recurrence once per "
    "time step, and bioopt.nn.LeakyRate, LIF or ALIF on their sum"
)


class Unwatchable(NamedTuple):
    """A layer that no rule can watch, and why."""

    name: str
    layer: nn.Module
    reason: str
    parameters: tuple[str, ...] = ()  #: the names to exclude where the layer has synapses inside


def find_synapses(module: nn.Module, prefix: str = "") -> list[Synapse]:
    """All plastic synapses of a module in registration order, without duplicates and frozen layers.

    Raises:
        ValueError: layers with a weight matrix that are no known synapses, or whose weight is no parameter. All are
            named.
    """
    found, unwatchable = survey(module, prefix)
    if unwatchable:
        raise ValueError(refusal("A learning rule", unwatchable))
    return found


def survey(
    module: nn.Module, prefix: str = "", excluded: Exclusion | None = None
) -> tuple[list[Synapse], list[Unwatchable]]:
    """The plastic synapses of a module in registration order, and the layers that cannot be watched."""
    found, unwatchable = [], []
    left_out = excluded or Exclusion.none()
    for name, layer in module.named_modules(prefix=prefix):
        if layer in left_out.layers:
            continue
        own = [(n, p) for n, p in layer.named_parameters(recurse=False) if p.requires_grad and p not in left_out.params]
        kind = type(layer)
        if any(is_lazy(p) for _, p in own):
            unwatchable.append(Unwatchable(name, layer, LAZY))
        elif is_parametrized(layer) and any(p.requires_grad for p in layer.parameters()):
            unwatchable.append(Unwatchable(name, layer, PARAMETRIZED))
        elif kind in _KINDS:
            if isinstance(layer.weight, nn.Parameter):
                if layer.weight.requires_grad and layer.weight not in left_out.params:
                    apart = getattr(layer, "bias", None) in left_out.params
                    channel_dim = _KINDS[kind].channel_dim
                    found.append(Synapse(name or kind.__name__, layer, channel_dim, fixed_bias=apart))
            elif own:
                reason = (
                    "its weight is computed from other parameters at each pass; undo that with prune.remove, "
                    "remove_spectral_norm or remove_weight_norm of torch.nn.utils"
                )
                unwatchable.append(Unwatchable(name, layer, reason))
        elif any(p.ndim > 1 for _, p in own):
            if isinstance(layer, nn.RNNBase | nn.RNNCellBase):
                unwatchable.append(Unwatchable(name, layer, FUSED))
                continue
            inside = [child for child in layer.modules() if type(child) in _KINDS]
            names = tuple(".".join(filter(None, (name, n))) for n, p in own if p.ndim > 1) if inside else ()
            unwatchable.append(Unwatchable(name, layer, UNKNOWN, names))
    return found, unwatchable


def refusal(rule: str, unwatchable: list[Unwatchable]) -> str:
    """The message about all layers that cannot be watched, with the option that excludes them."""
    whole = [one.layer for one in unwatchable if not one.parameters]
    unwatchable = [
        one for one in unwatchable if not any(one.layer is not w and one.layer in w.modules() for w in whole)
    ]
    alone = {type(one.layer) for one in unwatchable if one.reason == UNKNOWN and not one.parameters}
    names = [
        repr(name) for one in unwatchable if type(one.layer) not in alone for name in one.parameters or (one.name,)
    ]
    types = [f"torch.nn.{t.__name__}" if getattr(nn, t.__name__, None) is t else t.__name__ for t in alone]
    layers = "; ".join(
        f"layer '{one.name}' of type {type(one.layer).__name__}"
        + (f" with {', '.join(one.parameters)}" if one.parameters else "")
        + f" ({one.reason})"
        for one in unwatchable
    )
    known = (
        f"It knows {', '.join(t.__name__ for t in _KINDS)}; give another type that computes W x + b to "
        "bioopt.register_synapse(type, channel_dim=...). "
    )
    them = "them" if unwatchable[1:] else "it"
    return (
        f"{rule} cannot train {layers}. {known if alone else ''}To leave {them} untrained, or to another optimizer of "
        f"bioopt.Mixed, write exclude=[{', '.join([*sorted(types), *names])}], or freeze {them} with "
        "requires_grad_(False)"
    )


class Exclusion(NamedTuple):
    """The modules and parameters that a rule leaves out."""

    layers: set[nn.Module]  #: excluded modules, with all modules inside
    params: set[Tensor]  #: their parameters, and those excluded by name
    kinds: set[type[nn.Module]]  #: excluded types, for modules that are added later

    @classmethod
    def none(cls) -> Exclusion:
        """Nothing excluded."""
        return cls(set(), set(), set())

    @classmethod
    def of(cls, rule: str, exclude: Any, given: Iterable[tuple[str, nn.Module]]) -> Exclusion:
        """Resolve ``exclude`` (types, modules, names of modules or parameters) within the modules of ``params``.

        Raises:
            TypeError: an entry of another type; bare parameters.
            ValueError: a name or a module that is not there.
        """
        if isinstance(exclude, str | int | type | nn.Module):
            exclude = [exclude]
        # Numbers name the layers of a Sequential.
        entries, excluded = [str(e) if type(e) is int else e for e in exclude], cls.none()
        if not entries:
            return excluded
        modules: dict[str, nn.Module] = {}
        params: dict[str, Tensor] = {}
        for prefix, module in given:
            modules |= dict(module.named_modules(prefix=prefix, remove_duplicate=False))
            params |= dict(module.named_parameters(prefix=prefix, remove_duplicate=False))
        if not modules:
            raise TypeError(f"{rule}: exclude={entries} needs modules to look in: give the model, not its parameters")
        roots: list[nn.Module] = []
        for entry in entries:
            if isinstance(entry, type) and issubclass(entry, nn.Module):
                excluded.kinds.add(entry)
                roots += [m for m in modules.values() if isinstance(m, entry)]
            elif isinstance(entry, nn.Module) and entry in modules.values():
                roots.append(entry)
            elif isinstance(entry, str) and entry in modules:
                roots.append(modules[entry])
            elif isinstance(entry, str) and entry in params:
                excluded.params.add(params[entry])
            elif isinstance(entry, str | nn.Module):
                shown = repr(entry) if isinstance(entry, str) else f"a {type(entry).__name__}"
                raise ValueError(
                    f"{rule}: exclude has {shown}, which is no module or parameter of the model; names are those of "
                    "model.named_modules() and model.named_parameters()"
                )
            else:
                raise TypeError(
                    f"{rule}: exclude has {entry!r}; it takes module types, modules, and names of modules or parameters"
                )
        for root in roots:
            excluded.add(root)
        return excluded

    def add(self, module: nn.Module) -> None:
        """Exclude a module with all modules inside."""
        self.layers.update(module.modules())
        self.params.update(module.parameters())


class Unhooked(nn.Module):
    """A layer called without its hooks."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.layer.forward(*args, **kwargs)


def verify(synapse: Synapse, u: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Check that a layer of a registered type computes ``u = W x + b``; return whether this input could show it.

    A signal at every other neuron must give a local product in the rows of those neurons alone, the same for other
    weights.

    Raises:
        RuntimeError: the layer computes something else.
    """
    layer, weight, channel = synapse.layer, synapse.weight.detach(), synapse.channel_dim
    kind, wrong = type(layer).__name__, ""
    product = None
    if u.ndim < -channel or u.shape[channel] != len(weight):
        wrong = f"has {len(weight)} rows of weights and gave an output of shape {tuple(u.shape)}"
    elif u.numel():
        chosen = torch.arange(len(weight), device=weight.device) % 2 == 0
        signal = chosen.to(u.dtype).view(-1, *[1] * (-channel - 1)).expand_as(u)
        pattern = torch.linspace(0.9, 1.15, weight.numel(), dtype=weight.dtype, device=weight.device).view_as(weight)
        nearby = (weight + 0.01 * weight.abs().mean()) * pattern
        product, other = (_product_at(layer, w, signal, args, kwargs) for w in (weight, nearby))
        tolerance = 4 * max(torch.finfo(t.dtype).eps for t in (u, weight)) ** 0.5 * product.abs().max()
        if bool((product[~chosen] != 0).any()) or bool((product - other).abs().max() > tolerance):
            wrong = "computes something else"
    if wrong:
        raise RuntimeError(
            f"layer '{synapse.name}' of type {kind} was registered as u = W x + b with its neurons along dimension "
            f"{channel} and a row of W for each, but it {wrong}. Correct bioopt.register_synapse({kind}, "
            f"channel_dim=...), or leave it out by exclude=[{kind}]"
        )
    return product is not None and bool(product.any())


def _product_at(
    layer: nn.Module, weight: Tensor, signal: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Tensor:
    """``Σ s xᵀ`` with another weight; buffers and the random state are not changed."""
    weight = weight.clone().requires_grad_()
    state = {f"layer.{name}": b.clone() for name, b in layer.named_buffers()} | {"layer.weight": weight}
    devices = [weight.device] if weight.device.type == "cuda" else []
    with torch.random.fork_rng(devices), torch.enable_grad():
        u = torch.func.functional_call(Unhooked(layer), state, args, kwargs)
        (product,) = torch.autograd.grad(u, weight, signal.to(u.dtype), allow_unused=True)
    return torch.zeros_like(weight) if product is None else product
