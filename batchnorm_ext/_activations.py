"""Activations: the names that the operators know, PyTorch's functions and modules for them."""

import re
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = [
    "activate",
    "activate_in_place",
    "activation_name",
    "can_fuse",
    "is_activation",
    "then",
]

_FUNCTIONS: dict[str, Callable] = {
    "relu": F.relu,
    "relu6": F.relu6,
    "hardtanh": F.hardtanh,
    "leaky_relu": F.leaky_relu,
    "elu": F.elu,
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "hardswish": F.hardswish,
    "hardsigmoid": F.hardsigmoid,
    "mish": F.mish,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
}
_NUMBERS = {"hardtanh": 2, "leaky_relu": 1, "elu": 1}  # of arguments
_CALL = re.compile(r"(\w+)(?:\((.*)\))?")

# Module -> name and the attributes that are its arguments.
_MODULES: dict[type, tuple[str, ...]] = {
    nn.Identity: ("",),
    nn.ReLU: ("relu",),
    nn.ReLU6: ("relu6",),
    nn.Hardtanh: ("hardtanh", "min_val", "max_val"),
    nn.LeakyReLU: ("leaky_relu", "negative_slope"),
    nn.ELU: ("elu", "alpha"),
    nn.SiLU: ("silu",),
    nn.Hardswish: ("hardswish",),
    nn.Hardsigmoid: ("hardsigmoid",),
    nn.Mish: ("mish",),
    nn.Sigmoid: ("sigmoid",),
    nn.Tanh: ("tanh",),
}


_FORWARDS = {kind: kind.forward for kind in (*_MODULES, nn.GELU)}


def activation_name(activation: str | nn.Module | type[nn.Module]) -> str:
    """The name that the operators take, for a name, a module of torch.nn or its class."""
    if isinstance(activation, str):
        return _known(activation)
    if isinstance(activation, type) and activation in (*_MODULES, nn.GELU):
        activation = activation()
    if type(activation) is nn.GELU:
        return "gelu_tanh" if activation.approximate == "tanh" else "gelu"
    if type(activation) not in _MODULES:
        raise _unknown(activation)
    name, *attributes = _MODULES[type(activation)]
    values = [repr(float(getattr(activation, attribute))) for attribute in attributes]
    return f"{name}({', '.join(values)})" if values else name


_names: dict[str, str] = {"": "", "identity": ""}  # of what has been asked for


def _known(activation: str) -> str:
    """In the spelling of Python's numbers, which the operators read as well."""
    if activation not in _names:
        arguments = ", ".join(map(repr, _parsed(activation)[1]))
        name = activation.partition("(")[0]
        _names[activation] = f"{name}({arguments})" if arguments else name
    return _names[activation]


_known._dynamo_marked_constant = True  # a compiler would trace the regular expression


def activate(z: Tensor, activation: str) -> Tensor:
    """PyTorch's function of that name."""
    if not activation:
        return z
    function, arguments = _parsed(activation)
    return function(z, *arguments)


def activate_in_place(z: Tensor, activation: str) -> Tensor:
    """The same, written into ``z``."""
    function, arguments = _parsed(activation)
    if function in (torch.sigmoid, torch.tanh):
        return getattr(z, f"{activation}_")()
    return function(z, *arguments, inplace=True)


def can_fuse(input: Tensor, residual: Tensor | None, activation: str) -> bool:
    """Whether the operators take the activation: not of float64 on CUDA, and where backward can
    read what it needs.

    A ``leaky_relu`` of negative slope gives values of both signs the same sign: after a residual
    its output does not tell the slope.
    """
    if residual is not None and activation.startswith("leaky_relu(-"):
        return False
    return not (getattr(input, "is_cuda", False) and input.dtype == torch.float64)


def then(y: Tensor, residual: Tensor | None, activation: str) -> Tensor:
    """What follows a normalization, by PyTorch's functions."""
    return activate(y if residual is None else y + residual, activation)


def is_activation(module: object) -> bool:
    """Whether :func:`activation_name` has a name for what this module does."""
    kind = type(module)
    return kind in _FORWARDS and kind.forward is _FORWARDS[kind]  # as it was imported


def _parsed(activation: str) -> tuple[Callable, list[float]]:
    match = _CALL.fullmatch(activation)
    if match is None or match[1] not in _FUNCTIONS:
        raise _unknown(activation)
    if match[2] is None:
        return _FUNCTIONS[match[1]], []
    try:
        arguments = [float(text) for text in match[2].split(",")]
    except ValueError:
        raise _unknown(activation) from None
    if len(arguments) != _NUMBERS.get(match[1]):
        raise _unknown(activation)
    return _FUNCTIONS[match[1]], arguments


_parsed._dynamo_marked_constant = True


def _unknown(activation: object) -> ValueError:
    names = ", ".join(["identity", *_FUNCTIONS])
    return ValueError(
        f"expected activation to be one of {names}, some with arguments, as in leaky_relu(0.1), or "
        f"such a module of torch.nn, got {activation!r}"
    )
