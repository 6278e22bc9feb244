"""What the layers have in common: their forward, and what they hand to the operators."""

from collections.abc import Callable

import torch
import torch.nn.functional as F  # noqa: F401  (what torch.jit.script compiles, see __wrapped__)
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm

from batchnorm_ext import _ops, functional
from batchnorm_ext._native import BATCH_NORM
from batchnorm_ext._normalize import normalize
from batchnorm_ext._tracking import undone_on_error

LAYERS: set[type] = set()  # the classes of this library, and none derived from them


def own(module: nn.Module, kind: str, name: str) -> Tensor | None:
    """``getattr(module, name)`` without the half microsecond that a module spends on finding it.

    ``kind`` is "_parameters" or "_buffers".
    """
    attributes = module.__dict__
    members = attributes[kind]
    # parametrized or not, a subclass and an attribute of the layer itself may say otherwise
    if name in members and type(module) in LAYERS and name not in attributes:
        return members[name]
    return getattr(module, name)


class Fused:
    """Replaces ``forward`` of the ``torch.nn`` class that follows it in the list of bases."""

    def __init_subclass__(cls, **kwargs) -> None:
        super().__init_subclass__(**kwargs)
        cls.__native = cls.__mro__[cls.__mro__.index(Fused) + 1]
        if cls.__module__.startswith("batchnorm_ext."):
            LAYERS.add(cls)
            cls.__as_imported = staticmethod(getattr(cls.__native, "forward", None))

    def _forward_or_leave(self, input: Tensor, *more: Tensor) -> Tensor:
        """``more``: what a layer takes beside its input."""
        if self.__native.forward is not self.__as_imported:  # someone has replaced it
            return self._torch_forward(input, *more)
        if isinstance(input, fx.Proxy):
            return self.__traced(input, *more)
        return self._fused_forward(input, *more)

    def _torch_forward(self, input: Tensor) -> Tensor:
        return self.__native.forward(self, input)

    def __traced(self, input: fx.Proxy, *more: fx.Proxy) -> Tensor:
        """One node of the graph, where the tracer takes the ``torch.nn`` layer for a leaf.

        That layer's hooks would not run while it is traced. Ours have done so on the way here, and
        would again in the node.
        """
        if type(self) not in LAYERS:
            return self._torch_forward(input, *more)
        if self._forward_hooks or self._forward_pre_hooks or "forward" in self.__dict__:
            raise fx.proxy.TraceError(
                f"{type(self).__name__} with hooks or a forward of its own is traced only as the "
                "layer of torch.nn: call batchnorm_ext.revert(model) first"
            )
        twin = self.__native.__new__(self.__native)
        twin.__dict__ = self.__dict__
        path = input.tracer.path_of_module(self)
        if path and input.tracer.is_leaf_module(twin, path):
            return input.tracer.create_proxy("call_module", path, (input, *more), {})
        return self._torch_forward(input, *more)


def _stands_for(native: Callable) -> Callable[[Callable], Callable]:
    """torch.jit.script compiles the source of the native function instead, and errors name it."""

    def mark(function: Callable) -> Callable:
        function.__wrapped__ = native
        function.__qualname__ = native.__qualname__
        return function

    return mark


class FusedBatchNorm(Fused):
    @_stands_for(_BatchNorm.forward)
    def forward(self, input: Tensor) -> Tensor:
        return self._forward_or_leave(input)

    def _fused_forward(
        self, input: Tensor, residual: Tensor | None = None, activation: str = ""
    ) -> Tensor:
        more = () if residual is None else (residual,)
        plain = residual is None and not activation
        if _ops.leaves_process() or (plain and _ops.is_for_compiler()):
            if self._is_traced_as_torch():
                return self._torch_forward(input, *more)
        output = batch_norm_by_operator(self, input, residual, activation)
        if output is not None:
            return output
        batches = statistics(self)[2]
        if batches is None or torch.compiler.is_compiling():
            return self._torch_forward(input, *more)
        with undone_on_error(batches):
            return self._torch_forward(input, *more)

    def _is_traced_as_torch(self) -> bool:
        """Whether a tracer can take it as torch's own: not where it reads its counter."""
        return not (self.training and self.track_running_stats and self.momentum is None)


class FusedInstanceNorm(Fused):
    @_stands_for(_InstanceNorm.forward)
    def forward(self, input: Tensor) -> Tensor:
        return self._forward_or_leave(input)

    def _fused_forward(self, input: Tensor) -> Tensor:
        return self._torch_forward(input)  # which checks the input, and calls this:

    @_stands_for(_InstanceNorm._apply_instance_norm)
    def _apply_instance_norm(self, input: Tensor) -> Tensor:
        return functional.instance_norm(
            input,
            self.running_mean,
            self.running_var,
            self.weight,
            self.bias,
            self.training or not self.track_running_stats,
            self.momentum if self.momentum is not None else 0.0,
            self.eps,
        )


class FusedGroupNorm(Fused):
    @_stands_for(nn.GroupNorm.forward)
    def forward(self, input: Tensor) -> Tensor:
        return self._forward_or_leave(input)

    def _fused_forward(self, input: Tensor) -> Tensor:
        weight, bias = own(self, "_parameters", "weight"), own(self, "_parameters", "bias")
        return functional.group_norm(input, self.num_groups, weight, bias, self.eps)


class FusedLayerNorm(Fused):
    @_stands_for(nn.LayerNorm.forward)
    def forward(self, input: Tensor) -> Tensor:
        return self._forward_or_leave(input)

    def _fused_forward(self, input: Tensor) -> Tensor:
        weight, bias = own(self, "_parameters", "weight"), own(self, "_parameters", "bias")
        return functional.layer_norm(input, self.normalized_shape, weight, bias, self.eps)


class FusedRMSNorm(Fused):
    @_stands_for(nn.RMSNorm.forward)
    def forward(self, x: Tensor) -> Tensor:
        return self._forward_or_leave(x)

    def _fused_forward(self, input: Tensor) -> Tensor:
        weight = own(self, "_parameters", "weight")
        return functional.rms_norm(input, self.normalized_shape, weight, self.eps)


def batch_norm_by_operator(
    norm: _BatchNorm, input: Tensor, residual: Tensor | None, activation: str
) -> Tensor | None:
    """What the operators give for a layer, here or of torch.nn; None where they do not take it."""
    weight, bias = own(norm, "_parameters", "weight"), own(norm, "_parameters", "bias")
    mean, var, batches = statistics(norm)
    if not _ops.takes(BATCH_NORM, (input, mean, var, weight, bias, residual)):
        return None
    norm._check_input_dim(input)
    counted, batches, momentum = counting(norm.momentum, batches, mean, var)
    # in evaluation without buffers the statistics are those of the batch
    training = bool(norm.training) or (mean is None and var is None)
    tensors = (input, mean, var, weight, bias, batches, counted)
    return normalize(BATCH_NORM, *tensors, training, momentum, norm.eps, 0, residual, activation)


def statistics(module: nn.Module) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Running mean and variance and the counter of batches, as far as this forward uses them.

    In training without tracking the buffers, if any, are neither read nor written, and in
    evaluation no batch is counted.
    """
    if module.training and not module.track_running_stats:
        return None, None, None
    mean, var = own(module, "_buffers", "running_mean"), own(module, "_buffers", "running_var")
    batches = own(module, "_buffers", "num_batches_tracked") if module.training else None
    return mean, var, batches


def counting(
    momentum: float | None, batches: Tensor | None, mean: Tensor | None, var: Tensor | None
) -> tuple[Tensor | None, Tensor | None, float | None]:
    """The counter if it is to be raised here, or else for the operator to raise; the momentum.

    The operator counts in int64. A counter of another dtype, as averaging or a checkpoint leaves
    it, counts as natively. Without a counter ``momentum=None`` moves nothing.
    """
    if batches is None:
        return None, None, 0.0 if momentum is None else momentum
    if (
        (type(batches) is Tensor or isinstance(batches, _ops.STAND_INS))
        and batches.dtype is torch.int64
        and mean is not None
        and var is not None
        and batches.is_meta is mean.is_meta
    ):
        return None, batches, momentum
    if momentum is None and isinstance(batches, Tensor):
        momentum = 1 / float(batches.detach() + 1)
    return batches, None, momentum
