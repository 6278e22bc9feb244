"""Switching the batch normalization layers of an existing model over to this library, and back."""

import warnings
from collections.abc import Callable
from typing import TypeVar

from torch import nn
from torch.nn.utils import parametrize

from batchnorm_ext import modules

__all__ = ["convert", "revert"]

Module = TypeVar("Module", bound=nn.Module)

_OURS = {getattr(nn, name): getattr(modules, name) for name in modules.__all__}
_NATIVE = {ours: native for native, ours in _OURS.items()}


def convert(module: Module) -> Module:
    """Make every ``nn.BatchNorm1d/2d/3d`` in ``module`` run on the fused kernels.

    ``module`` itself and the lazy forms are included. In place and lossless: only the class of each
    layer changes. The module objects, their parameters and buffers (shared ones stay shared),
    hooks, training flags, dtypes, devices and parametrizations are untouched, and an optimizer that
    holds the parameters goes on. Only the exact ``torch.nn`` types are converted: a subclass may
    have its own ``forward`` and is left as it is.

    Args:
        module: any module; converting twice is harmless.

    Returns:
        ``module``.

    Warns:
        UserWarning: names the layers that derive from a batch normalization class and were left as
            they are.

    Example::

        >>> model = batchnorm_ext.convert(torchvision.models.resnet50())
    """
    return _swap(module, _OURS, is_done=_is_ours)


def revert(module: Module) -> Module:
    """Undo :func:`convert`: make every layer of this library the ``torch.nn`` layer it stands for.

    In place and as lossless as :func:`convert`; subclasses of this library's layers are left as
    they are.

    Args:
        module: any module, converted or built with this library's classes.

    Returns:
        ``module``.

    Warns:
        UserWarning: names the subclasses of this library's layers that were left.

    Example::

        >>> # can be loaded where batchnorm_ext is not installed
        >>> torch.save(batchnorm_ext.revert(model), "model.pt")
    """
    return _swap(module, _NATIVE, is_done=lambda layer: not _is_ours(layer))


def _is_ours(layer: nn.Module) -> bool:
    return isinstance(layer, tuple(_NATIVE))


def _swap(
    module: Module, classes: dict[type, type], is_done: Callable[[nn.Module], bool]
) -> Module:
    """Change classes by the table, and warn of the subclasses that are left."""
    skipped = []
    for name, layer in module.named_modules():
        if is_done(layer):
            continue
        kind = type(layer)
        if kind in classes:
            layer.__class__ = classes[kind]
        elif parametrize.is_parametrized(layer) and kind.__base__ in classes:
            # register_parametrization gave this layer a class of its own, which holds the
            # parametrized properties
            layer.__class__ = type(kind.__name__, (classes[kind.__base__],), dict(kind.__dict__))
        elif isinstance(layer, tuple(classes)):
            skipped.append(f"{name or 'the module itself'} ({kind.__qualname__})")
    if skipped:
        warnings.warn(
            "left as they are, because they are subclasses and may compute something else: "
            + ", ".join(skipped),
            stacklevel=3,
        )
    return module
