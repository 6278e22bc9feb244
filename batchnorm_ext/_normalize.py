"""Calls the operators, and torch's own function for what they refuse."""

from collections.abc import Callable
from contextlib import nullcontext

import torch
from torch import Tensor

from batchnorm_ext import _ops
from batchnorm_ext._activations import can_fuse, then
from batchnorm_ext._native import Native
from batchnorm_ext._tracking import track, undone_on_error


def normalize(
    native: Native,
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    num_batches_tracked: Tensor | None,
    counted: Tensor | None,
    training: bool,
    momentum: float | None,
    eps: float,
    groups: int = 0,
    residual: Tensor | None = None,
    activation: str = "",
) -> Tensor:
    """Call the operator for these arguments; what it does not take goes to torch's function.

    ``momentum`` may be None with ``num_batches_tracked``: the cumulative average. ``counted`` is a
    counter that the operator does not take. With ``groups`` each sample has statistics of its own
    for each of so many groups of channels. ``residual`` is added before the activation.
    """
    if (activation or residual is not None) and not can_fuse(input, residual, activation):
        state = (running_mean, running_var, weight, bias, num_batches_tracked, counted)
        y = normalize(native, input, *state, training, momentum, eps, groups)
        return then(y, residual, activation)
    fits = isinstance(eps, _NUMBER) and (eps > 0 or groups > 0 or (eps == 0 and not training))
    if fits and isinstance(momentum, _MOMENTUM) and isinstance(training, bool):
        try:
            if not training or (running_mean is None and running_var is None):
                options = (training, eps, groups, True, 1, residual, activation)
                output = _ops.batch_norm(input, weight, bias, running_mean, running_var, *options)
                if counted is not None:
                    counted.add_(1)
                return output
            if running_mean is not None and running_var is not None:
                state = (running_mean, running_var, num_batches_tracked, counted)
                options = (momentum, eps, groups)
                if activation or residual is not None:
                    options += (residual, activation)
                return track(_ops.batch_norm_update, input, weight, bias, *state, *options)
        except RuntimeError as error:
            if not _ops.is_refusal(error) or torch.compiler.is_compiling():
                raise
            _ops.log_once(native.name, str(error).partition("\n")[0])
    batches = (num_batches_tracked, counted)
    tensors = (input, running_mean, running_var, weight, bias)
    output = _by_torch(native, *tensors, *batches, training, momentum, eps)
    return then(output, residual, activation)


def by_operator(
    native: Native, eps: float, tensors: tuple[Tensor | None, ...], operator: Callable, *arguments
) -> Tensor | None:
    """What an operator gives that writes nothing, or None where the call is torch's own.

    ``eps`` and ``tensors``, the input first, are those among the arguments. ``operator`` may be a
    function around one, which returns None where it has nothing to compute.
    """
    if not isinstance(eps, _NUMBER) or _ops.leaves_process():
        return None
    reason = _ops.refusal(native, tensors)
    if reason is None:
        try:
            return operator(*arguments)
        except RuntimeError as error:
            if not _ops.is_refusal(error) or torch.compiler.is_compiling():
                raise
            reason = str(error).partition("\n")[0]
    if not torch.compiler.is_compiling():
        _ops.log_once(native.name, reason)
    return None


_NUMBER = (float, int)
_MOMENTUM = (*_NUMBER, type(None))


def _by_torch(
    native,
    input,
    running_mean,
    running_var,
    weight,
    bias,
    batches,
    counted,
    training,
    momentum,
    eps,
) -> Tensor:
    if batches is not None and momentum is None:
        momentum = 1 / float(batches + 1)
    may_undo = training and not torch.compiler.is_compiling()
    with undone_on_error(running_mean, running_var) if may_undo else nullcontext():
        output = native(input, running_mean, running_var, weight, bias, training, momentum, eps)
    for counter in (batches, counted):
        if counter is not None:
            counter.add_(1)
    return output
