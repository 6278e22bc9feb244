"""What rewritten forwards call: a norm, an addition and an activation, fused where that is right.

Each function computes what the steps would one after the other. It takes them one after the other
where a call shows what the rewriting could not know: hooks, layers that have been replaced, a
residual that broadcasts.
"""

import operator
from collections.abc import Callable

from torch import Tensor, nn
from torch.nn.modules import module as torch_module
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm

from batchnorm_ext import _ops, functional, modules
from batchnorm_ext._act import batch_norm_act, group_norm_act, instance_norm_act
from batchnorm_ext._activations import (
    activate,
    activate_in_place,
    activation_name,
    can_fuse,
    is_activation,
)
from batchnorm_ext._layer import batch_norm_by_operator, own
from batchnorm_ext.sync import SyncBatchNorm

FUSED_NORMS = frozenset((SyncBatchNorm,)) | frozenset(
    getattr(package, name)
    for package in (nn, modules)
    for name in modules.__all__
    if name.startswith(("BatchNorm", "InstanceNorm", "GroupNorm"))
)

# the classes that a norm has its forward from, and that forward
_FORWARDS = {
    kind: [
        (base, base.forward)
        for base in (kind, next(b for b in kind.__mro__ if b.__module__.startswith("torch.nn.")))
    ]
    for kind in FUSED_NORMS
}
_FORWARDS[SyncBatchNorm].append((nn.SyncBatchNorm, nn.SyncBatchNorm.forward))


def is_plain(module: nn.Module) -> bool:
    """Whether calling the module is calling the forward of its class, and no hook sees it."""
    members = module.__dict__
    return not (
        members["_forward_hooks"]
        or members["_forward_pre_hooks"]
        or members["_backward_hooks"]
        or members["_backward_pre_hooks"]
        or "forward" in members
    )


def is_sequential(module: nn.Module) -> bool:
    """Whether calling it is calling its children one after the other."""
    kind = type(module)
    if not isinstance(module, nn.Sequential) or kind.__iter__ is not nn.Sequential.__iter__:
        return False
    own = kind.forward is nn.Sequential.forward or hasattr(kind.forward, "runs_sequential")
    return own and kind.__call__ is nn.Module.__call__


def last_layer(module: nn.Module) -> nn.Module | None:
    """The layer whose result is that of the module, if no hook sees the calls on the way."""
    while is_sequential(module) and is_plain(module) and module._modules:
        module = next(reversed(module._modules.values()))
    return module


def is_pair(norm: nn.Module, following: nn.Module | None) -> bool:
    """Whether what follows is the activation of a norm."""
    found = is_activation(following) and type(following) is not nn.Identity
    return found and type(norm) in FUSED_NORMS


def run_sequential(layers: list[nn.Module], x: Tensor) -> Tensor:
    """Call the layers one after the other, fused where they can be."""
    place = 0
    while place < len(layers):
        layer = layers[place]
        following = layers[place + 1] if place + 1 < len(layers) else None
        if is_pair(last_layer(layer), following):
            x = norm_then(layer, x, following)
            place += 2
        else:
            x = layer(x)
            place += 1
    return x


def norm_then(
    module: nn.Module,
    x: Tensor,
    activation: nn.Module | str | None = None,
    residual: Tensor | None = None,
    written: str = "",
) -> Tensor:
    """``activation(module(x) + residual)`` for a norm, or layers in sequence that end in one.

    ``activation`` is a module or a name, with an underscore before it if it is done in place.
    ``written``: "norm" or "residual" if the sum is written into that.
    """
    while last_layer(module) is not module and not torch_module._has_any_global_hook():
        *first, module = module._modules.values()
        x = run_sequential(first, x)
    taken = type(module) in FUSED_NORMS and isinstance(x, Tensor)
    if taken and _are_plain(module, activation) and _fits(x, residual):
        y = _fused(module, x, residual, _name(activation))
        if y is not None:
            return y
    return _finish(module(x), activation, residual, written)


def batch_norm_then(*arguments) -> Tensor:
    """The same for ``torch.nn.functional.batch_norm``, whose arguments come first."""
    return _function_then(batch_norm_act, functional.batch_norm, *arguments)


def instance_norm_then(*arguments) -> Tensor:
    """The same for ``torch.nn.functional.instance_norm`` without running statistics."""
    return _function_then(instance_norm_act, _instance_norm, *arguments)


def group_norm_then(*arguments) -> Tensor:
    """The same for ``torch.nn.functional.group_norm``."""
    return _function_then(group_norm_act, functional.group_norm, *arguments)


def _function_then(fused: Callable, norm: Callable, *arguments) -> Tensor:
    *arguments, activation, residual, written = arguments
    if _fits(arguments[0], residual):
        return fused(*arguments, _name(activation), residual)
    return _finish(norm(*arguments), activation, residual, written)


def _instance_norm(input: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    return functional.instance_norm(input, None, None, weight, bias, True, 0.0, eps)


def _are_plain(norm: nn.Module, activation: nn.Module | str | None) -> bool:
    if torch_module._has_any_global_hook() or not is_plain(norm):
        return False
    if any(base.forward is not forward for base, forward in _FORWARDS[type(norm)]):
        return False  # someone has replaced it
    if isinstance(activation, nn.Module):
        return is_activation(activation) and is_plain(activation)
    return True


def _fits(x: Tensor, residual: Tensor | None) -> bool:
    """Whether the residual is like x, and so like the output of a norm, which the sum has to be."""
    return residual is None or (
        isinstance(residual, Tensor)
        and residual.shape == x.shape
        and residual.dtype == x.dtype
        and residual.device == x.device
    )


def _name(activation: nn.Module | str | None) -> str:
    if activation is None:
        return ""
    if isinstance(activation, str):
        return activation.removeprefix("_")
    return activation_name(activation)


def _finish(
    y: Tensor, activation: nn.Module | str | None, residual: Tensor | None, written: str
) -> Tensor:
    if residual is not None:
        if written:
            target, addend = (y, residual) if written == "norm" else (residual, y)
            target += addend
            y = target
        else:
            y = y + residual
    if activation is None:
        return y
    if isinstance(activation, str):
        in_place = activation.startswith("_")
        return activate_in_place(y, activation[1:]) if in_place else activate(y, activation)
    return activation(y)


def _fused(norm: nn.Module, x: Tensor, residual: Tensor | None, name: str) -> Tensor | None:
    """None where the layer's own forward has more to do, or to refuse."""
    if isinstance(norm, _BatchNorm):
        return _batch_norm(norm, x, residual, name)
    weight, bias = own(norm, "_parameters", "weight"), own(norm, "_parameters", "bias")
    if isinstance(norm, _InstanceNorm):
        batched = x.dim() == norm._get_no_batch_dim() + 1 and x.size(1) == norm.num_features
        if not batched or norm.running_mean is not None:
            return None
        return instance_norm_act(x, weight, bias, norm.eps, name, residual)
    return group_norm_act(x, norm.num_groups, weight, bias, norm.eps, name, residual)


def _batch_norm(norm: nn.Module, x: Tensor, residual: Tensor | None, name: str) -> Tensor | None:
    if not can_fuse(x, residual, name) or _ops.leaves_process():
        return None
    group = norm._group_now() if isinstance(norm, SyncBatchNorm) else None
    if group is not None:
        return norm._synchronized(group, x, residual, name)
    return batch_norm_by_operator(norm, x, residual, name)


def _in_place(name: str) -> Callable:
    """``a += b`` and the like as a function.

    For ``operator.iadd`` torch.fx writes the statement ``a += b``. If ``a`` is a number, that also
    changes what later nodes read as ``a``.
    """
    function = getattr(operator, name)

    def write(value: object, other: object) -> object:
        return function(value, other)

    write.__name__ = write.__qualname__ = name
    return write


iadd, isub, imul, itruediv = map(_in_place, ("iadd", "isub", "imul", "itruediv"))
ifloordiv, imod, ipow, imatmul = map(_in_place, ("ifloordiv", "imod", "ipow", "imatmul"))
iand, ior, ixor, ilshift, irshift = map(_in_place, ("iand", "ior", "ixor", "ilshift", "irshift"))
IN_PLACE = frozenset(
    (iadd, isub, imul, itruediv, ifloordiv, imod, ipow, imatmul, iand, ior, ixor, ilshift, irshift)
)
