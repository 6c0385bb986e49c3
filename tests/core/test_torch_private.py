"""What bioopt uses of torch without a promise: when torch changes, these fail first."""

from __future__ import annotations

import ast
import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import bioopt
from bioopt.core import _torch_private as private


def test_backward_passes_are_numbered_and_known_on_their_thread() -> None:
    seen = []
    x = torch.ones(2, requires_grad=True)
    y = x * 2
    y.register_hook(lambda gradient: seen.append((private.backward_pass(), private.in_backward())))
    y.sum().backward(retain_graph=True)
    y.sum().backward()
    (first, inside), (second, _) = seen
    assert inside
    assert second > first >= 0
    assert private.backward_pass() == -1
    assert not private.in_backward()


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing_runs_layers_again_inside_a_backward_pass(use_reentrant: bool) -> None:
    seen = []

    def layer(x: Tensor) -> Tensor:
        seen.append(private.in_backward())
        return x.sin()

    checkpoint(layer, torch.ones(2, requires_grad=True), use_reentrant=use_reentrant).sum().backward()
    assert seen == [False, True]


def test_tensors_inside_transformations_are_known() -> None:
    seen = []

    def look(x: Tensor) -> Tensor:
        seen.append((private.is_batched(x), private.is_transformed(x)))
        return x

    torch.func.vmap(look)(torch.ones(2, 3))
    torch.func.grad(lambda x: look(x).sum())(torch.ones(2))
    look(torch.ones(2))
    assert seen == [(True, True), (False, True), (False, False)]


def test_views_are_known() -> None:
    x = torch.ones(2, 3)
    assert private.is_view(x[0])
    assert not private.is_view(x + 1)


def test_versions_grow_with_changes_in_place() -> None:
    x = torch.ones(2)
    before = private.version_of(x)
    x.add_(1)
    assert before is not None
    assert private.version_of(x) == before + 1
    with torch.inference_mode():
        assert private.version_of(torch.ones(2)) is None


def test_nodes_know_the_function_that_made_them() -> None:
    class One(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            ctx.kept = "kept"
            return x * 2

        @staticmethod
        def backward(ctx: Any, gradient: Tensor) -> Tensor:
            return gradient

    class Other(One):
        pass

    y = One.apply(torch.ones(2, requires_grad=True))
    assert private.is_node_of(y.grad_fn, One)
    assert not private.is_node_of(y.grad_fn, Other)
    assert not private.is_node_of((y * 2).grad_fn, One)
    assert y.grad_fn.kept == "kept"
    y.grad_fn.metadata["bioopt"] = 1  # which is public, and lasts as long as the graph
    assert (y * 2).grad_fn.next_functions[0][0].metadata["bioopt"] == 1


def test_levels_of_forward_differentiation_are_known() -> None:
    assert not private.in_dual_level()
    assert private.forward_gradients_enabled()
    with forward_ad.dual_level():
        assert private.in_dual_level()
        with torch.autograd.forward_ad._set_fwd_grad_enabled(False):
            assert not private.forward_gradients_enabled()
    assert not private.in_dual_level()


def test_grad_mode_is_switched_in_one_call() -> None:
    private.set_grad_mode(False)
    assert not torch.is_grad_enabled()
    private.set_grad_mode(True)
    assert torch.is_grad_enabled()


def test_hooks_on_saved_tensors_are_removed_as_long_as_they_are_ours() -> None:
    def pack(tensor: Tensor) -> Tensor:
        return tensor

    seen = []
    theirs = saved_tensors_hooks(lambda t: seen.append(t) or t, lambda t: t)
    with theirs:
        for _ in range(2):
            saved_tensors_hooks(pack, pack).__enter__()  # an interrupt has come before the exit
        private.remove_saved_tensor_hooks(pack)
        torch.ones(2, requires_grad=True).sin()
        assert len(seen) == 1
        private.remove_saved_tensor_hooks(pack)  # there are none
        torch.ones(2, requires_grad=True).sin()
        assert len(seen) == 2


def test_a_running_ddp_module_is_known(tmp_path: Any) -> None:
    seen = []

    class Inside(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            seen.append(private.active_ddp())
            return super().forward(x)

    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        model = DistributedDataParallel(Inside(2, 2))
        model(torch.ones(1, 2))
    finally:
        torch.distributed.destroy_process_group()
    assert seen == [model]
    assert private.active_ddp() is None


def test_hooks_of_a_module_are_where_they_are_looked_for() -> None:
    layer = nn.Linear(2, 2)

    def before(module: nn.Module, args: Any) -> None: ...

    layer.register_forward_pre_hook(before)
    layer.register_forward_hook(lambda module, args, kwargs, output: None, with_kwargs=True, always_call=True)
    assert private.forward_pre_hooks(layer) == [before]
    for table, flags in private.HOOK_TABLES.items():
        assert len(getattr(layer, table)) == 1
        for flag in flags:
            assert isinstance(getattr(layer, flag), dict)
    assert set(vars(layer)) >= {name for table, flags in private.HOOK_TABLES.items() for name in (table, *flags)}


def test_modules_are_copied_by_their_state() -> None:
    """Copies without our hooks rest on `nn.Module` having no way of its own to be copied, and on this form of it."""
    layer = nn.Linear(2, 2)
    made, arguments, state = layer.__reduce_ex__(2)[:3]
    again = made(*arguments)
    again.__setstate__(state)
    assert torch.equal(again.weight, layer.weight)
    assert nn.Linear.__reduce_ex__ is object.__reduce_ex__
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(twin.weight, layer.weight)


def test_buffers_and_parameters_of_a_module_can_be_read_and_written() -> None:
    norm = nn.BatchNorm1d(2)
    assert isinstance(norm, private.NormBase)
    assert set(private.own_buffers(norm)) == {"running_mean", "running_var", "num_batches_tracked"}
    private.own_buffers(norm)["running_mean"] = torch.ones(2)
    assert torch.equal(norm.running_mean, torch.ones(2))
    assert private.own_parameters(norm)["weight"] is norm.weight
    assert private.own_parameters(nn.Linear(2, 2, bias=False))["bias"] is None


def test_batch_norm_changes_its_statistics_without_a_new_version() -> None:
    """So they are copied every time; if this ever fails, they no longer need to be."""
    norm = nn.BatchNorm1d(2)
    before, version = norm.running_mean.clone(), private.version_of(norm.running_mean)
    norm(torch.randn(4, 2) + 5)
    assert not torch.equal(norm.running_mean, before)
    assert private.version_of(norm.running_mean) == version


def test_a_step_without_hooks() -> None:
    p = nn.Parameter(torch.ones(2))
    optimizer, calls = torch.optim.SGD([p], lr=1.0), []
    optimizer.register_step_pre_hook(lambda *args: calls.append(args))
    p.grad = torch.ones(2)
    with torch.no_grad():
        private.unhooked_step(optimizer)
    assert not calls
    assert torch.equal(p, torch.zeros(2))


def test_schedulers_look_for_the_mark_of_a_step() -> None:
    optimizer = torch.optim.SGD([nn.Parameter(torch.ones(2))], lr=1.0)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    with pytest.warns(UserWarning, match="lr_scheduler.step"):
        scheduler.step()
    optimizer = torch.optim.SGD([nn.Parameter(torch.ones(2))], lr=1.0)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    private.mark_as_stepped(optimizer)
    scheduler.step()


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_the_gradient_at_a_convolution_s_input(dims: int) -> None:
    kind = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1]
    layer = kind(4, 6, 3, stride=2, padding=1, dilation=2, groups=2).double()
    x = torch.randn(2, 4, *[9] * dims, dtype=torch.float64, requires_grad=True)
    u = layer(x)
    g = torch.randn_like(u)
    (expected,) = torch.autograd.grad(u, x, g)
    got = private.convolution_input_gradient(
        g, x.shape, layer.weight.detach(), layer.stride, layer.padding, layer.dilation, layer.groups
    )
    assert torch.equal(got, expected)


def test_each_use_has_a_test() -> None:
    source = Path(__file__).read_text()
    for name, value in vars(private).items():
        if getattr(value, "__module__", "") == private.__name__ or name in ("HOOK_TABLES", "NormBase"):
            assert f"private.{name}" in source, name


def test_no_private_name_of_torch_is_used_elsewhere() -> None:
    found = []
    for path in Path(bioopt.__file__).parent.rglob("*.py"):
        if path.name == "_torch_private.py":
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.Attribute) or not node.attr.startswith("_") or node.attr.startswith("__"):
                continue
            value = ast.unparse(node.value)
            private_of_torch = value.split(".")[0] in ("torch", "nn", "F", "forward_ad") or node.attr in (
                "_is_view", "_version", "_buffers", "_forward_hooks", "_forward_pre_hooks", "_conv_forward",
                "_opt_called", "_reversed_padding_repeated_twice",
            )  # fmt: skip
            if private_of_torch or node.attr.startswith("_saved_"):
                found.append(f"{path.name}:{node.lineno} {value}.{node.attr}")
    assert not found, found
