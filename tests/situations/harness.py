"""Runs a situation on native PyTorch and on this library, and lists where the outcomes differ."""

from __future__ import annotations

import contextlib
import random
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

import batchnorm_ext
import tolerances

LAYERS = [
    "BatchNorm1d",
    "BatchNorm2d",
    "BatchNorm3d",
    "LazyBatchNorm1d",
    "LazyBatchNorm2d",
    "LazyBatchNorm3d",
    "SyncBatchNorm",
    "InstanceNorm1d",
    "InstanceNorm2d",
    "InstanceNorm3d",
    "LazyInstanceNorm1d",
    "LazyInstanceNorm2d",
    "LazyInstanceNorm3d",
    "GroupNorm",
    "LayerNorm",
    "RMSNorm",
]
FUNCTIONS = ["batch_norm", "instance_norm", "group_norm", "layer_norm", "rms_norm"]


class Library:
    """The layers and the functions that a situation is about, as attributes."""

    def __init__(self, layers: dict[str, Callable], functions: object, switch: Callable) -> None:
        self.__dict__.update(layers)
        self.__dict__.update({name: getattr(functions, name) for name in FUNCTIONS})
        self.switch = switch  # makes the native layers of a finished model those of the library


def _converted(name: str) -> Callable[..., nn.Module]:
    convert = batchnorm_ext.convert
    if name == "SyncBatchNorm":
        convert = batchnorm_ext.convert_sync_batchnorm
    return lambda *args, **kwargs: convert(getattr(nn, name)(*args, **kwargs))


NATIVE = Library({n: getattr(nn, n) for n in LAYERS}, nn.functional, lambda model: model)
OURS = {
    "built": Library(
        {n: getattr(batchnorm_ext, n) for n in LAYERS},
        batchnorm_ext.functional,
        batchnorm_ext.convert,
    ),
    "converted": Library(
        {n: _converted(n) for n in LAYERS},
        batchnorm_ext.functional,
        batchnorm_ext.convert,
    ),
}


@dataclass
class Situation:
    """A use of the layers: ``run(library)`` returns what came of it, or raises."""

    name: str
    run: Callable[[Library], object]
    of_classes: bool  # derives from the classes or asks about them: nothing that is converted
    scale: float  # the largest magnitude of the terms that its results add up


SITUATIONS: dict[str, Situation] = {}


def situation(name: str, *, of_classes: bool = False, scale: float = 1.0) -> Callable:
    """Add the decorated function to ``SITUATIONS``."""

    def add(run: Callable[[Library], object]) -> Callable[[Library], object]:
        assert name not in SITUATIONS, name
        SITUATIONS[name] = Situation(name, run, of_classes, scale)
        return run

    return add


@dataclass
class Raised:
    """An exception in place of a result."""

    kind: type
    text: str
    changed: list[str] = field(default_factory=list)  # what the call that failed left changed


@contextlib.contextmanager
def unchanged(**tensors: Tensor | None):
    """Notes which of the tensors have changed, where the calls within fail."""
    tensors = {n: t for n, t in tensors.items() if isinstance(t, Tensor) and not t.is_meta}
    before = {name: (tensor._version, tensor.detach().clone()) for name, tensor in tensors.items()}
    try:
        yield
    except Exception as error:
        error.changed = [
            name
            for name, (version, value) in before.items()
            if tensors[name]._version != version
            or not torch.equal(tensors[name].detach().nan_to_num(7), value.nan_to_num(7))
        ]
        raise


def attempt(layer: nn.Module, *args) -> object:
    """``layer(*args)``, which may fail and then must not have touched the layer."""
    held = dict(layer.named_parameters()) | dict(layer.named_buffers())
    with unchanged(**{name.replace(".", "_"): tensor for name, tensor in held.items()}):
        return layer(*args)


def caught(run: Callable, *args) -> object:
    """What ``run`` returns, or raises."""
    try:
        return run(*args)
    except Exception as error:
        return Raised(type(error), str(error), getattr(error, "changed", []))


@dataclass
class Outcome:
    result: object
    warnings: list[tuple[type, str]]


def observe(case: Situation, library: Library) -> Outcome:
    """Run a situation from the same random numbers every time."""
    torch.manual_seed(0)
    random.seed(0)
    always = torch.is_warn_always_enabled()
    torch.set_warn_always(True)  # warnings that are given once would be those of the first library
    try:
        with warnings.catch_warnings(record=True) as given:
            warnings.simplefilter("always")
            result = caught(case.run, library)
    finally:
        torch.set_warn_always(always)
    # each once: how often TorchScript warns depends on what it has compiled before
    return Outcome(result, list(dict.fromkeys((w.category, str(w.message)) for w in given)))


def differences(native: Outcome, ours: Outcome, scale: float) -> dict[str, tuple]:
    """Where two outcomes differ: path -> (native's, ours)."""
    found: dict[str, tuple] = {}
    if native.warnings != ours.warnings:
        found["warnings"] = native.warnings, ours.warnings
    _compare("", native.result, ours.result, scale, found)
    return found


def _compare(path: str, native: object, ours: object, scale: float, found: dict) -> None:
    if isinstance(native, Raised) or isinstance(ours, Raised):
        _compare_errors(path, native, ours, found)
    elif isinstance(native, Tensor) and isinstance(ours, Tensor):
        _compare_tensors(path, native, ours, scale, found)
    elif isinstance(native, NESTED) and type(native) is type(ours):
        _compare_nested(path, native, ours, scale, found)
    elif isinstance(native, NESTED | Tensor) or isinstance(ours, NESTED | Tensor):
        found[path or "result"] = type(native).__name__, type(ours).__name__
    elif native != ours and not (native != native and ours != ours):
        found[path or "result"] = native, ours


NESTED = dict | list | tuple


def _compare_nested(path: str, native: NESTED, ours: NESTED, scale: float, found: dict) -> None:
    def items(value):
        if isinstance(value, dict):
            return {f"{path}.{key}".lstrip("."): item for key, item in value.items()}
        return {f"{path}[{i}]": item for i, item in enumerate(value)}

    native, ours = items(native), items(ours)
    if list(native) != list(ours):
        found[f"{path}.keys".lstrip(".")] = list(native), list(ours)
        return
    for name, value in native.items():
        _compare(name, value, ours[name], scale, found)


def _compare_errors(path: str, native: object, ours: object, found: dict) -> None:
    if not (isinstance(native, Raised) and isinstance(ours, Raised)):
        found[path or "result"] = _shown(native), _shown(ours)
        return
    if native.kind is not ours.kind or not ours.text.startswith(native.text):
        found[path or "result"] = _shown(native), _shown(ours)
    if ours.changed:
        found[f"{path}.changed".lstrip(".")] = native.changed, ours.changed


def _compare_tensors(path: str, native: Tensor, ours: Tensor, scale: float, found: dict) -> None:
    for name, of in FACTS.items():
        facts = of(native), of(ours)
        if facts[0] != facts[1]:
            found[f"{path}.{name}".lstrip(".")] = facts
    if native.is_meta or native.shape != ours.shape:
        return
    native, ours = _plain(native), _plain(ours)
    if native.dtype.is_floating_point and native.dtype.itemsize > 1:
        bound = tolerances.between(native, scale, min(native.dtype, ours.dtype, key=_precision))
        native, ours = native.double(), ours.double()
        close = (native - ours).abs() <= bound
    else:
        close = torch.zeros_like(native, dtype=torch.bool)
    close |= (native == ours) | ((native != native) & (ours != ours))
    if not close.all():
        found[f"{path}.values".lstrip(".")] = _values(native, close), _values(ours, close)


def _values(tensor: Tensor, close: Tensor) -> object:
    """All values of a small tensor, otherwise the first few of those that are not close."""
    return tensor.tolist() if tensor.numel() <= 8 else tensor[~close][:8].tolist()


def _precision(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).bits


FACTS = {
    "type": lambda t: type(t).__name__,
    "dtype": lambda t: t.dtype,
    "shape": lambda t: None if t.is_nested else tuple(t.shape),
    "device": lambda t: t.device,
    "layout": lambda t: t.layout,
    "requires_grad": lambda t: t.requires_grad,
    "is_leaf": lambda t: t.is_leaf,
    "stride": lambda t: t.stride() if t.layout is torch.strided and not t.is_nested else None,
    "is_inference": lambda t: t.is_inference(),
}


def _plain(tensor: Tensor) -> Tensor:
    """The values of a tensor of any layout and class."""
    with torch._C.DisableTorchFunctionSubclass():
        tensor = tensor.detach()
        if tensor.is_nested:
            tensor = torch.cat([part.flatten() for part in tensor.unbind()])
        if tensor.is_quantized:
            tensor = tensor.dequantize()
        if tensor.layout is not torch.strided:
            tensor = tensor.to_dense()
        return tensor


def _shown(value: object) -> object:
    if isinstance(value, Raised):
        return f"{value.kind.__name__}: {value.text}"
    return "a result" if isinstance(value, Tensor | NESTED) else value
