"""Folding normalization in evaluation into the convolution or linear layer next to it."""

import copy
import warnings
from collections import Counter
from itertools import chain
from typing import Literal, TypeVar, overload

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.utils import parametrize

from batchnorm_ext import _ops, modules
from batchnorm_ext._graph import NORMS, Call, Chain, Report, chains
from batchnorm_ext._weights import Weights, channels
from batchnorm_ext.population import float64_affine
from batchnorm_ext.sync import SyncBatchNorm

__all__ = ["fold"]

Module = TypeVar("Module", bound=nn.Module)

# The number of spatial dimensions, which norm and layer must have in common: on an unbatched image
# a norm of fewer would take another dimension for the channels. None: any.
_NORMS = {nn.SyncBatchNorm: None, SyncBatchNorm: None} | {
    getattr(package, f"{kind}Norm{dims}d"): dims
    for package in (nn, modules)
    for kind in ("Batch", "Instance")
    for dims in (1, 2, 3)
}
_LAYERS = {nn.Linear: 0} | {
    getattr(nn, f"{kind}{dims}d"): dims for kind in ("Conv", "ConvTranspose") for dims in (1, 2, 3)
}
_LAYER_BASES = (_ConvNd, nn.Linear)
_DROPOUTS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d)
_IN_TRAINING = "in training mode: call model.eval() first"


@overload
def fold(model: Module, inplace: bool = False, report: Literal[False] = False) -> Module: ...
@overload
def fold(
    model: Module, inplace: bool = False, *, report: Literal[True]
) -> tuple[Module, Report]: ...
@torch.no_grad()
def fold(
    model: Module, inplace: bool = False, report: bool = False
) -> Module | tuple[Module, Report]:
    r"""Fold normalization into the convolutions and linear layers next to it, for inference.

    In evaluation a norm with running statistics is a map per channel, ``scale * x + shift``
    (:func:`as_affine`), which a layer ``W x + b`` before or after it can do as well:

    .. math::
        \mathrm{scale} (W x + b) + \mathrm{shift}
            &= (\mathrm{scale}\, W) x + (\mathrm{scale}\, b + \mathrm{shift}) \\
        W (\mathrm{scale}\, x + \mathrm{shift}) + b
            &= (W \mathrm{scale})\, x + (W \mathrm{shift} + b)

    Source: Jacob et al., *Quantization and Training of Neural Networks for Efficient
    Integer-Arithmetic-Only Inference*, 2018, section 3.2, equation 14.

    Folds ``BatchNorm1d/2d/3d``, ``SyncBatchNorm`` and ``InstanceNorm1d/2d/3d`` with running
    statistics, of ``torch.nn`` and of this library, into ``Linear``, ``Conv1d/2d/3d`` and
    ``ConvTranspose1d/2d/3d``. First into the layer before, where that is always exact; else into
    the layer after, where no shift is missing: not where a convolution pads with zeros, nor where a
    transposed convolution adds up different parts of its kernel, unless the shift is zero.
    ``Identity`` and dropout in evaluation may lie between. Unlike
    :func:`torch.nn.utils.fusion.fuse_conv_bn_eval`, which takes one pair and returns a layer, this
    finds the pairs; unlike ``torch.fx.experimental.optimization.fuse``, it returns the model and
    not a graph.

    The pairs are those of the graph that ``torch.fx`` traces, with the default of each optional
    argument. Where it cannot trace the model, they are neighbours in an ``nn.Sequential``, of which
    it is taken for granted that it is only ever called as a whole. A norm stays as it is, with a
    reason in the report, where it is in training mode or uses statistics of its input, where the
    value between the two is used or seen elsewhere (hooks), and where norm or layer are called
    twice, parametrized, subclassed or share parameters with others.

    Batches are expected, as batch normalization does: ``(N, C, ...)`` to a convolution, ``(N, C)``
    to a norm next to a linear layer, which afterwards refuses other inputs.

    Args:
        model: any module; call ``model.eval()`` before. Its parameters may be float32, float64,
            bfloat16 or float16, on any device.
        inplace: change ``model`` itself and not a copy.
        report: return what has been done, too.

    Returns:
        The folded model. Each folded norm has become an ``nn.Identity``, so that its entries in the
        ``state_dict`` are gone; a layer without a bias may have got one; all other modules and
        entries keep their names. Weights are computed in float64 and rounded once, to the dtype
        that they had. With ``report=True`` also an object with ``done`` and ``left``, from the path
        of each norm to what became of it or why it was left, ``note``, and a readable ``str``.

    Warns:
        UserWarning: names the norms in training mode.

    Raises:
        TypeError, RuntimeError: a model that ``copy.deepcopy`` cannot copy, without ``inplace``. If
            anything raises, the model is as before.
        ValueError: later, by the folded model, for an input other than ``(N, C)`` to a norm that
            was next to a linear layer.

    Example::

        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU()).eval()
        >>> folded, report = batchnorm_ext.fold(model, report=True)
        >>> print(report)
        folded 1 of 1 layers
          folded 1 into 0 (Conv2d)
        >>> x = torch.randn(2, 3, 16, 16)
        >>> torch.allclose(folded(x), model(x), atol=1e-5)
        True
    """
    if not inplace:
        model = copy.deepcopy(model)
    plan = _Plan(model)
    plan.apply()
    if training := [name for name, why in plan.report.left.items() if why is _IN_TRAINING]:
        warnings.warn(f"not folded: {', '.join(training)}: {_IN_TRAINING}", stacklevel=2)
    return (model, plan.report) if report else model


class _Plan:
    """What is to be folded; nothing changes before :meth:`apply`."""

    def __init__(self, model: nn.Module) -> None:
        self.report = Report("folded")
        found, self.report.note = chains(model)
        owners = chain.from_iterable(m.parameters(recurse=False) for m in model.modules())
        self.owners = Counter(map(id, owners))
        self.layers: dict[nn.Module, Weights] = {}
        self.parameters: dict[nn.Module, dict[str, nn.Parameter]] = {}  # the same, rounded
        self.norms: dict[nn.Module, nn.Module] = {}  # what each becomes
        for one in found:
            self._fold(one)
        if not self.report.note:
            unseen = "not called in evaluation, or within a module that torch.fx does not look into"
        else:
            unseen = "not in an nn.Sequential"
        for name, module in model.named_modules():
            if isinstance(module, NORMS) and name not in self.report.done:
                self.report.left.setdefault(name or "the model", unseen)

    def _fold(self, one: Chain) -> None:
        """Into the layer before, from the first to the last, then into that after, backwards."""
        kept: list[Call] = []
        reasons: dict[str, str] = {}
        for call in one.calls:
            if _does_nothing(call.module):
                continue
            if isinstance(call.module, NORMS):
                if reason := self._norm_refusal(call):
                    self.report.left[call.name] = reason
                elif reason := self._into(kept[-1] if kept else one.before, call, after=False):
                    reasons[call.name] = reason
                else:
                    continue
            kept.append(call)
        following: Call | str = one.after
        for call in reversed(kept):
            if call.name in reasons:
                reason = self._into(following, call, after=True)
                if not reason:
                    continue
                before = reasons[call.name]
                self.report.left[call.name] = f"before it {before}, after it {reason}"
            following = call

    def _into(self, neighbour: Call | str, call: Call, after: bool) -> str:
        """Fold a norm into the layer before or after it, or say why not."""
        if isinstance(neighbour, str):
            return neighbour
        layer, norm = neighbour.module, call.module
        if not isinstance(layer, _LAYER_BASES):
            return str(neighbour)
        scale, shift = float64_affine(norm)
        reason = (
            neighbour.obstacle
            or self._layer_refusal(layer)
            or _mismatch(norm, layer, after)
            or (_border_refusal(layer, shift) if after else "")
        )
        if reason:
            return f"{neighbour}: {reason}"
        weights = self.layers.get(layer) or Weights.of(layer)
        weights = weights.after_map(scale, shift) if after else weights.before_map(scale, shift)
        dtype = str(layer.weight.dtype).removeprefix("torch.")
        parameters = weights.rounded(layer)
        if not all(parameter.isfinite().all() for parameter in parameters.values()):
            return f"{neighbour}: the folded weights are not finite in {dtype}"
        self.layers[layer], self.parameters[layer] = weights, parameters
        self.norms[norm] = nn.Identity().train(norm.training)
        if isinstance(layer, nn.Linear):
            self.norms[norm].register_forward_pre_hook(_expect_rows)
        rounded = f", rounded to {dtype}" if layer.weight.dtype.itemsize == 2 else ""
        self.report.done[call.name] = f"into {neighbour}{rounded}"
        return ""

    def _norm_refusal(self, call: Call) -> str:
        norm = call.module
        if call.obstacle:
            return call.obstacle
        if isinstance(norm, LazyModuleMixin):
            return "lazy: run it once first"
        tracks = isinstance(norm, _BatchNorm) or getattr(norm, "track_running_stats", False)
        if tracks and norm.training:
            return _IN_TRAINING
        if not tracks or norm.running_mean is None or norm.running_var is None:
            return "normalizes with the statistics of its input"
        return self._refusal(norm, _NORMS)

    def _layer_refusal(self, layer: nn.Module) -> str:
        if reason := self._refusal(layer, _LAYERS):
            return reason
        if any(type(own) not in (nn.Parameter, type(None)) for own in (layer.weight, layer.bias)):
            return "its weight or bias is no parameter"
        if layer.weight.dtype not in _ops.DTYPES:
            return f"its weight has dtype {layer.weight.dtype}"
        return ""

    def _refusal(self, module: nn.Module, kinds: dict) -> str:
        if parametrize.is_parametrized(module):
            return "parametrized"
        if type(module) not in kinds or "forward" in module.__dict__:
            return "a subclass, or with a forward of its own"
        tensors = [module.weight, module.bias, getattr(module, "running_mean", None)]
        parameters = [tensor for tensor in tensors if tensor is not None]
        if any(type(tensor) not in (nn.Parameter, Tensor) for tensor in parameters):
            return "its parameters are tensors of another class"
        if any(tensor.is_meta or tensor.is_quantized for tensor in parameters):
            return "its parameters have no values, or quantized ones"
        if any(self.owners[id(tensor)] > 1 for tensor in parameters):
            return "shares parameters with another module"
        return ""

    def apply(self) -> None:
        for layer, parameters in self.parameters.items():
            layer._parameters.update(parameters)
        for norm, identity in self.norms.items():
            # the same object, whoever holds it
            norm.__class__ = nn.Identity
            norm.__dict__ = identity.__dict__


def _does_nothing(module: nn.Module) -> bool:
    kind = type(module)
    nothing = kind is nn.Identity or (kind in _DROPOUTS and not module.training)
    return nothing and "forward" not in module.__dict__


def _mismatch(norm: nn.Module, layer: nn.Module, after: bool) -> str:
    """Why the channels of the norm are not those of the layer."""
    dims, expected = _NORMS[type(norm)], _LAYERS[type(layer)]
    rows = isinstance(norm, _BatchNorm) and dims == 1 and expected == 0
    if dims not in (None, expected) and not rows:
        return f"its channels lie in another dimension than those of {type(norm).__name__}"
    number = channels(layer)[0 if after else 1]
    if number != norm.running_mean.numel():
        return f"has {number} channels, the norm {norm.running_mean.numel()}"
    if layer.weight.device != norm.running_mean.device:
        return f"is on {layer.weight.device}, the norm on {norm.running_mean.device}"
    return ""


def _border_refusal(layer: nn.Module, shift: Tensor) -> str:
    """Why not every output of ``layer`` gets the whole kernel times the shift of a norm before it.

    What pads with values of the input pads with shifted ones. A transposed convolution gives all of
    its kernel to the outputs at least ``dilation * (kernel_size - 1)`` from either end of its full
    result, and to these alone, if its stride is 1; padding crops that result.
    """
    if isinstance(layer, nn.Linear) or not shift.any():
        return ""
    reach = [d * (k - 1) for d, k in zip(layer.dilation, layer.kernel_size, strict=True)]
    if isinstance(layer, _ConvTransposeNd):
        crops = zip(layer.padding, layer.output_padding, reach, strict=True)
        if set(layer.stride) == {1} and all(p - extra >= r for p, extra, r in crops):
            return ""
        return "its outputs get different parts of the kernel, and of the norm's shift with it"
    padding = {"valid": [0], "same": reach}.get(layer.padding, layer.padding)
    if layer.padding_mode == "zeros" and any(padding):
        return "pads with zeros, which the norm does not shift"
    return ""


def _expect_rows(module: nn.Module, args: tuple[Tensor]) -> None:
    if args[0].dim() != 2:
        raise ValueError(
            f"expected 2D input (got {args[0].dim()}D input): the norm here has been folded into a "
            "linear layer"
        )
