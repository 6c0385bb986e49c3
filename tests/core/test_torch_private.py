"""Each use of torch that torch makes no promise about. When torch changes, these fail first."""

from __future__ import annotations

import inspect

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from bioopt.core import _torch_private as private


def test_each_use_has_a_test() -> None:
    tested = "\n".join(inspect.getsource(value) for name, value in globals().items() if name.startswith("test_"))
    own = [n for n, value in vars(private).items() if getattr(value, "__module__", None) == private.__name__]
    assert len(own) > 15
    for name in [*own, "NormBase", "HOOK_TABLES"]:
        assert f"private.{name}" in tested, name


def test_normalisation_layers_with_running_statistics() -> None:
    for layer in (nn.BatchNorm1d(2), nn.SyncBatchNorm(2), nn.InstanceNorm2d(2), nn.LazyBatchNorm2d()):
        assert isinstance(layer, private.NormBase)
    assert not isinstance(nn.LayerNorm(2), private.NormBase)


def test_tables_of_hooks() -> None:
    layer = nn.Linear(2, 2)
    layer.register_forward_pre_hook(print, with_kwargs=True)
    layer.register_forward_hook(print, with_kwargs=True, always_call=True)
    for table, more in private.HOOK_TABLES.items():
        (key,) = vars(layer)[table]
        assert all(key in vars(layer)[other] for other in more)
    # A further table that goes with hooks would have to be added.
    touched = {name for name, value in vars(layer).items() if "hook" in name and isinstance(value, dict) and value}
    assert touched == {*private.HOOK_TABLES, *(name for more in private.HOOK_TABLES.values() for name in more)}
    assert private.forward_pre_hooks(layer) == [print]


def test_numbers_of_backward_passes() -> None:
    seen: list[tuple[int, bool]] = []
    x = torch.ones((), requires_grad=True)
    y = x * 2
    y.register_hook(lambda gradient: seen.append((private.backward_pass(), private.in_backward())))
    assert private.backward_pass() == -1
    assert not private.in_backward()
    y.backward(retain_graph=True)
    y.backward()
    (first, inside), (second, _) = seen
    assert inside
    assert -1 < first < second
    assert private.backward_pass() == -1


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_checkpoint_runs_again_inside_a_backward_pass(reentrant: bool) -> None:
    seen: list[bool] = []

    def block(x: Tensor) -> Tensor:
        seen.append(private.in_backward())
        return x.exp()

    checkpoint(block, torch.ones(2, requires_grad=True), use_reentrant=reentrant).sum().backward()
    assert seen == [False, True]


def test_transformed_tensors() -> None:
    seen: list[tuple[bool, bool]] = []

    def look(x: Tensor) -> Tensor:
        seen.append((private.is_batched(x), private.is_transformed(x)))
        return x.sum()

    look(torch.ones(2))
    torch.func.vmap(look)(torch.ones(3, 2))
    torch.func.grad(look)(torch.ones(2))
    assert seen == [(False, False), (True, True), (False, True)]


def test_views_and_versions() -> None:
    base = torch.zeros(4)
    assert not private.is_view(base)
    assert private.is_view(base[1:])
    before = private.version_of(base)
    assert before is not None
    base.add_(1)
    after = private.version_of(base)
    assert after is not None
    assert after > before
    with torch.inference_mode():
        assert private.version_of(torch.zeros(2)) is None


class _Double(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        return 2 * x

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        return 2 * gradient


def test_the_function_that_made_a_node() -> None:
    y = _Double.apply(torch.ones((), requires_grad=True))
    assert private.is_node_of(y.grad_fn, _Double)
    assert not private.is_node_of(y.exp().grad_fn, _Double)


def test_levels_of_forward_mode() -> None:
    assert not private.in_dual_level()
    assert private.forward_gradients_enabled()
    seen: list[bool] = []
    with forward_ad.dual_level():
        assert private.in_dual_level()
        checkpoint(
            lambda x: seen.append(private.forward_gradients_enabled()) or x,
            torch.ones(2, requires_grad=True),
            use_reentrant=True,
        )
    assert seen == [False]
    assert not private.in_dual_level()


def test_grad_mode_in_one_call() -> None:
    try:
        private.set_grad_mode(False)
        assert not torch.is_grad_enabled()
    finally:
        private.set_grad_mode(True)
    assert torch.is_grad_enabled()


def test_saved_tensor_hooks_left_over() -> None:
    def pack(tensor: Tensor) -> Tensor:
        return tensor

    def other(tensor: Tensor) -> Tensor:
        return tensor

    with saved_tensors_hooks(other, other):
        left = [saved_tensors_hooks(pack, pack) for _ in range(2)]
        for hooks in left:
            hooks.__enter__()
        private.remove_saved_tensor_hooks(pack)
        private.remove_saved_tensor_hooks(pack)  # leaves those of others
        assert torch._C._autograd._top_saved_tensors_default_hooks(True)[0] is other
    assert torch._C._autograd._top_saved_tensors_default_hooks(True) is None


def test_the_ddp_module_that_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """A run under DistributedDataParallel is in `tests/core/test_ranks.py`."""
    assert private.active_ddp() is None
    module = object()
    monkeypatch.setattr(nn.parallel.DistributedDataParallel, "_active_ddp_module", module)
    assert private.active_ddp() is module


def test_a_modules_own_tensors() -> None:
    norm = nn.BatchNorm1d(2)
    assert list(private.own_buffers(norm)) == ["running_mean", "running_var", "num_batches_tracked"]
    private.own_buffers(norm)["running_mean"] = torch.ones(2)
    assert torch.equal(norm.running_mean, torch.ones(2))
    assert list(private.own_parameters(norm)) == ["weight", "bias"]
    assert private.own_parameters(norm)["weight"] is norm.weight
    assert private.own_parameters(nn.Linear(2, 2, bias=False))["bias"] is None


def test_a_step_without_hooks_counts_for_schedulers() -> None:
    p = nn.Parameter(torch.ones(2))
    optimizer = torch.optim.SGD([p], lr=0.5)
    optimizer.register_step_post_hook(lambda *_: pytest.fail("the hook ran"))
    scheduler = torch.optim.lr_scheduler.ConstantLR(optimizer)
    p.grad = torch.ones(2)
    before = optimizer.param_groups[0]["lr"]
    private.unhooked_step(optimizer)
    torch.testing.assert_close(p.detach(), torch.full((2,), 1 - before))
    private.mark_as_stepped(optimizer)
    scheduler.step()  # without torch's warning that no step was made, an error here


def test_a_scheduler_warns_where_no_step_is_marked() -> None:
    optimizer = torch.optim.SGD([nn.Parameter(torch.ones(2))], lr=0.5)
    scheduler = torch.optim.lr_scheduler.ConstantLR(optimizer)
    with pytest.warns(UserWarning, match="optimizer.step"):
        scheduler.step()


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv1d(2, 4, 3, stride=2, padding=1),
        nn.Conv2d(4, 6, 3, padding=(1, 2), dilation=(1, 2), groups=2),
        nn.Conv3d(2, 2, 2, bias=False),
    ],
)
def test_the_gradient_at_the_input_of_a_convolution(layer: nn.Module) -> None:
    layer = layer.double()
    x = torch.randn(3, layer.in_channels, *[7] * (layer.weight.ndim - 2), dtype=torch.float64, requires_grad=True)
    u = layer(x)
    gradient = torch.randn_like(u)
    found = private.convolution_input_gradient(
        gradient, x.shape, layer.weight, layer.stride, layer.padding, layer.dilation, layer.groups
    )
    torch.testing.assert_close(found, *torch.autograd.grad(u, x, gradient))
