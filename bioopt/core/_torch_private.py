"""Every use of private torch API: one function each, and one test each in ``tests/core/test_torch_private.py``.

When torch changes, those tests fail first, and only this file needs a repair.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.optim import Optimizer

#: the base class of all normalisation layers that keep running statistics
NormBase: type[nn.Module] = _NormBase

#: tables of a module's forward hooks -> tables of their options
HOOK_TABLES = {
    "_forward_pre_hooks": ("_forward_pre_hooks_with_kwargs",),
    "_forward_hooks": ("_forward_hooks_with_kwargs", "_forward_hooks_always_called"),
}


def backward_pass() -> int:
    """The number of the backward pass that is running on this thread, larger for later ones; -1 outside of any."""
    return torch._C._current_graph_task_id()


def in_backward() -> bool:
    """Whether a backward pass is running on this thread, as when activation checkpointing runs a layer again."""
    return backward_pass() != -1


def is_batched(tensor: Tensor) -> bool:
    """Whether a tensor has a dimension hidden by `torch.func.vmap`."""
    return bool(torch._C._functorch.is_batchedtensor(tensor))


def is_transformed(tensor: Tensor) -> bool:
    """Whether a tensor belongs to a transform of `torch.func`, which it must not outlive."""
    return bool(torch._C._functorch.is_functorch_wrapped_tensor(tensor))


def is_view(tensor: Tensor) -> bool:
    """Whether a tensor is a view of another one, so that it cannot be marked dirty."""
    return tensor._is_view()


def version_of(tensor: Tensor) -> int | None:
    """A count of changes in place; ``None`` for inference tensors, which have none."""
    return None if tensor.is_inference() else tensor._version


def is_node_of(node: Any, function: type[torch.autograd.Function]) -> bool:
    """Whether a node of a graph belongs to this `torch.autograd.Function`."""
    return getattr(node, "_forward_cls", None) is function


def in_dual_level() -> bool:
    """Whether a level of forward-mode differentiation is open."""
    return forward_ad._current_level >= 0


def forward_gradients_enabled() -> bool:
    """Whether forward-mode derivatives are computed here; reentrant checkpointing switches them off."""
    return torch._C._is_fwd_grad_enabled()


def set_grad_mode(enabled: bool) -> None:
    """Set grad mode in one call, so that an interrupt cannot leave it half-done."""
    torch._C._set_grad_enabled(enabled)


def remove_saved_tensor_hooks(pack: Callable[[Tensor], Any]) -> None:
    """Remove the innermost default hooks on saved tensors while they use this function to pack."""
    tensors = torch._C._autograd
    while (top := tensors._top_saved_tensors_default_hooks(True)) is not None and top[0] is pack:
        tensors._pop_saved_tensors_default_hooks()


def active_ddp() -> nn.Module | None:
    """The DistributedDataParallel module whose forward pass is running."""
    return nn.parallel.DistributedDataParallel._active_ddp_module


def forward_pre_hooks(module: nn.Module) -> list[Any]:
    """The hooks that run before a module's forward pass."""
    return list(module._forward_pre_hooks.values())


def own_buffers(module: nn.Module) -> dict[str, Tensor | None]:
    """The buffers of a module itself, to read and write."""
    return module._buffers


def own_parameters(module: nn.Module) -> dict[str, nn.Parameter | None]:
    """The parameters of a module itself."""
    return module._parameters


def unhooked_step(optimizer: Optimizer) -> None:
    """The step of an optimizer inside another one, without step hooks, which run for the outer one."""
    step = type(optimizer).step
    getattr(step, "__wrapped__", step)(optimizer)


def mark_as_stepped(optimizer: Optimizer) -> None:
    """Mark that a step was made: learning-rate schedulers, which wrap ``step``, warn otherwise."""
    optimizer._opt_called = True  # type: ignore[attr-defined]


def convolution_input_gradient(
    gradient: Tensor, shape: torch.Size, weight: Tensor, stride: Any, padding: Any, dilation: Any, groups: int
) -> Tensor:
    """The gradient at a convolution's input for the gradient at its output, without a forward pass."""
    unused = gradient.new_empty(1).expand(shape)  # only its shape matters
    dims = [0] * (weight.ndim - 2)
    found: Tensor = torch.ops.aten.convolution_backward(
        gradient, unused, weight, None, stride, padding, dilation, False, dims, groups, (True, False, False)
    )[0]
    return found
