"""The functions of ``torch.nn.functional`` that this library takes over."""

from contextlib import contextmanager, nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor

from batchnorm_ext import _ops
from batchnorm_ext._tracking import track

__all__ = ["batch_norm"]


def batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    r"""Batch normalization, as :func:`torch.nn.functional.batch_norm`.

    .. math:: y = \frac{x - \mathrm{E}[x]}{\sqrt{\mathrm{Var}[x] + \epsilon}} * \gamma + \beta

    with mean and (biased) variance per channel, over all other dimensions of ``input`` in training,
    from ``running_mean`` and ``running_var`` otherwise. Source: Ioffe & Szegedy, *Batch
    Normalization: Accelerating Deep Network Training by Reducing Internal Covariate Shift*, 2015,
    algorithms 1 and 2.

    Args:
        input: ``(N, C, *)`` in float32, float64, bfloat16 or float16, in any memory format; the
            output keeps it. Any other input is handed to :func:`torch.nn.functional.batch_norm`.
        running_mean, running_var: ``(C,)``, or both None (then ``training`` must be true). In
            training they move to the statistics of the batch by ``momentum``, the variance to the
            unbiased one.
        weight, bias: gamma and beta, ``(C,)``. These and the running statistics are float32 or of
            input's dtype.
        training: use the statistics of the batch.
        momentum: share of the batch in the new running statistics.
        eps: added to the variance; positive in training.

    Returns:
        Tensor of the shape, dtype and memory format of ``input``.

    Raises:
        ValueError: one value per channel in training; eps out of range; only one running statistic
            given.
        RuntimeError: sizes, dtypes or devices that do not fit together; no running statistics in
            evaluation; running statistics that share memory with each other or with themselves.
        NotImplementedError: integer or boolean input.

        But for shared memory these are the errors of PyTorch's own function. All tensors are then
        as they were.

    Example::

        >>> x = torch.randn(8, 16, 32, 32)
        >>> y = batchnorm_ext.functional.batch_norm(x, None, None, training=True)
        >>> y.mean().abs() < 1e-6, (y.var() - 1).abs() < 1e-3
        (tensor(True), tensor(True))
    """
    if not torch.jit.is_scripting():
        if (
            momentum is not None
            and not _ops.leaves_process()
            and _ops.takes(input, running_mean, running_var, weight, bias)
        ):
            return normalize(
                input, weight, bias, running_mean, running_var, None, training, momentum, eps
            )
    return F.batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps)


def normalize(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    num_batches_tracked: Tensor | None,
    training: bool,
    momentum: float | None,
    eps: float,
) -> Tensor:
    """Call the operator for these arguments; what it does not take goes to torch's function.

    ``momentum`` may be None with ``num_batches_tracked``: the cumulative average.
    """
    arguments = (input, weight, bias, running_mean, running_var)
    options = (num_batches_tracked, training, momentum, eps)
    if not (
        isinstance(eps, _NUMBER) and isinstance(momentum, _MOMENTUM) and isinstance(training, bool)
    ):
        return _by_torch(*arguments, *options)
    try:
        if not training or (running_mean is None and running_var is None):
            return _ops.batch_norm(*arguments, training, eps)[0]
        if running_mean is not None and running_var is not None:
            return track(_ops.batch_norm_update, *arguments, num_batches_tracked, momentum, eps)
    except RuntimeError as error:
        # what the kernels do not take, and what is no tensor
        refused = isinstance(error, NotImplementedError) or _WRONG_TYPE in str(error)
        if not refused or torch.compiler.is_compiling():
            raise
        _ops.log_once(str(error).partition("\n")[0])
    return _by_torch(*arguments, *options)


_NUMBER = (float, int)
_MOMENTUM = (float, int, type(None))
_WRONG_TYPE = "Expected a value of type"


def _by_torch(
    input, weight, bias, running_mean, running_var, num_batches_tracked, training, momentum, eps
) -> Tensor:
    if num_batches_tracked is not None and momentum is None:
        momentum = 1 / float(num_batches_tracked + 1)
    with undone_on_error(running_mean, running_var) if training else nullcontext():
        output = F.batch_norm(
            input, running_mean, running_var, weight, bias, training, momentum, eps
        )
    if num_batches_tracked is not None:
        num_batches_tracked.add_(1)
    return output


@contextmanager
def undone_on_error(*written):
    """PyTorch's function may write before it fails: then these tensors get their values back."""
    written = [tensor for tensor in written if isinstance(tensor, Tensor)]
    before = [tensor.detach().clone() for tensor in written]
    versions = [0 if tensor.is_inference() else tensor._version for tensor in written]
    try:
        yield
    except Exception:
        for tensor, value, version in zip(written, before, versions, strict=True):
            if not torch.equal(tensor, value):
                tensor.data.copy_(value)
            if not tensor.is_inference():
                torch._C._autograd._unsafe_set_version_counter((tensor,), (version,))
        raise
