"""Outputs of fused norms that autograd does not keep, but maps again when backward needs them."""

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch._C._autograd import _top_saved_tensors_default_hooks
from torch.autograd.graph import saved_tensors_hooks
from torch.compiler import is_compiling

from batchnorm_ext._library import C, logger

__all__ = [
    "RecomputedTensor",
    "log_kept_once",
    "note_compiler",
    "recompute_activations",
    "recomputed",
    "recomputes",
]

# What recompute_activations lays on saved tensors, and whether it keeps a tensor by itself.
pack, unpack, is_recomputed, set_share = C.pack, C.unpack, C.is_recomputed, C.set_share


def recomputes() -> bool:
    """Whether outputs of norms are not kept for backward, here and now."""
    hooks = _top_saved_tensors_default_hooks(True)
    return hooks is not None and hooks[0] is pack


@functools.cache
def log_kept_once(reason: str) -> None:
    logger.debug("recompute_activations has no effect %s", reason)


def note_compiler(asked: bool = False) -> None:
    """Say that outputs are not recomputed, for norms in code that is compiled.

    ``asked``: the code asks for it; otherwise who calls it may have.
    """
    if asked or recomputes():
        log_kept_once("in compiled code: the compiler decides what it computes again")


note_compiler._dynamo_marked_constant = True  # runs while the code is compiled


@contextmanager
def recompute_activations(share: float = 0.6) -> Iterator[None]:
    """Keep less for backward: outputs of fused norms are computed again instead of being kept.

    What a layer after a norm saves for its backward is the output of the norm,
    ``phi(norm(x) + r)``. Within this context it is not kept; backward maps it again from ``x``,
    which the norm keeps anyway, its statistics and ``r``: one pass over memory, no reduction, and
    bit for bit the same output, so that gradients are the same bits as well. Running statistics do
    not move again.

    It holds for the calling thread, and for norms by the kernels of this library, with a gradient:
    ``BatchNorm*``, ``InstanceNorm*`` and ``GroupNorm`` (with more than one element per sample and
    channel), with or without a residual and an activation, as layers, functions, or of a model that
    ``fuse`` has rewritten. All else is kept as without the context: outputs of ``LayerNorm``,
    ``RMSNorm`` and of ``SyncBatchNorm`` over several ranks, outputs that have been written to, and
    every third output in a chain of residuals.

    Of two contexts of saved tensors the inner one counts: within an activation checkpoint or
    ``save_on_cpu`` this one does nothing. Compiled code, which decides by itself what it computes
    again, ignores it. Both are logged, once, at level debug.

    Source: Chen et al., *Training Deep Nets with Sublinear Memory Cost*, 2016,
    https://arxiv.org/abs/1604.06174, section 3; Rota Bulò et al., *In-Place Activated BatchNorm for
    Memory-Optimized Training of DNNs*, 2018, https://arxiv.org/abs/1712.02616, inverts the
    activation instead.

    Args:
        share: of the bytes of the outputs that can be computed again, those that are. What is not
            kept costs the time of a pass over memory: a few percent of a training step for all of
            a ResNet-50, up to ten for all of a MobileNetV2, which is bound by memory. Default: 0.6.

    Raises:
        ValueError: a share that is not positive, or above 1.
        RuntimeError: in backward, if the input of a norm or what was added to its output has been
            written to since, in the words of autograd.

    Example::

        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(),
        ...                       nn.Conv2d(8, 8, 3))
        >>> model = batchnorm_ext.fuse(model)
        >>> with batchnorm_ext.recompute_activations():
        ...     loss = model(torch.randn(2, 3, 16, 16)).sum()
        >>> loss.backward()
    """
    if not 0 < share <= 1:
        raise ValueError(f"expected share to be positive and at most 1, got {share}")
    if is_compiling():
        note_compiler(True)
        yield
    elif _top_saved_tensors_default_hooks(True) is not None and not recomputes():
        log_kept_once("within other hooks on saved tensors")
        yield
    else:
        before = set_share(float(share), 0.0)
        try:
            with saved_tensors_hooks(pack, unpack):
                yield
        finally:
            set_share(*before)


def recomputed(norm: Callable[..., Tensor], *arguments: Tensor) -> Tensor:
    """What the norm gives for these arguments, as an output that is not kept by what reads it."""
    if is_compiling():
        note_compiler(True)
        return norm(*arguments)
    with recompute_activations(share=1):
        output = norm(*arguments)
    return output if recomputes() else _marked(output)


class RecomputedTensor(Tensor):
    """An output whose readers save it within ``recompute_activations``; their results are plain."""

    @classmethod
    def __torch_function__(cls, function, types, arguments=(), options=None):
        with torch._C.DisableTorchFunctionSubclass(), recompute_activations(share=1):
            result = function(*arguments, **(options or {}))
        # a view shares what is not to be kept, with its readers
        return _marked(result) if isinstance(result, Tensor) and result._is_view() else result


def _marked(output: Tensor) -> Tensor:
    if type(output) is Tensor and is_recomputed(output):
        output.__class__ = RecomputedTensor
    return output
