"""Activations: the names that the operators know, PyTorch's functions and modules for them."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = [
    "ACTIVATIONS",
    "activate",
    "activate_in_place",
    "activation_name",
    "can_fuse",
    "is_activation",
    "named",
    "then",
]


@dataclass(frozen=True)
class Row:
    """An activation as PyTorch has it.

    ``parameters``: what the function takes after its input, and the module has as attributes, with
    their defaults. ``reads_output``: whether backward after a residual reads the output, where
    PyTorch's reads the input.
    """

    function: Callable
    module: type[nn.Module] | None = None
    parameters: dict[str, object] = field(default_factory=dict)
    reads_output: bool = False
    source: str = ""


ACTIVATIONS = {
    "relu": Row(F.relu, nn.ReLU),
    "relu6": Row(F.relu6, nn.ReLU6, reads_output=True),
    "hardtanh": Row(F.hardtanh, nn.Hardtanh, {"min_val": -1.0, "max_val": 1.0}, True),
    "leaky_relu": Row(F.leaky_relu, nn.LeakyReLU, {"negative_slope": 0.01}, True),
    "elu": Row(
        F.elu,
        nn.ELU,
        {"alpha": 1.0},
        source="Clevert et al., *Fast and Accurate Deep Network Learning by Exponential Linear "
        "Units*, 2016, https://arxiv.org/abs/1511.07289",
    ),
    "silu": Row(
        F.silu,
        nn.SiLU,
        source="Elfwing et al., *Sigmoid-Weighted Linear Units for Neural Network Function "
        "Approximation in Reinforcement Learning*, 2018, https://arxiv.org/abs/1702.03118",
    ),
    "gelu": Row(
        F.gelu,
        nn.GELU,
        {"approximate": "none"},
        source="Hendrycks & Gimpel, *Gaussian Error Linear Units*, 2016, "
        "https://arxiv.org/abs/1606.08415",
    ),
    "gelu_tanh": Row(partial(F.gelu, approximate="tanh")),
    "hardswish": Row(
        F.hardswish,
        nn.Hardswish,
        source="Howard et al., *Searching for MobileNetV3*, 2019, https://arxiv.org/abs/1905.02244",
    ),
    "hardsigmoid": Row(F.hardsigmoid, nn.Hardsigmoid),
    "mish": Row(
        F.mish,
        nn.Mish,
        source="Misra, *Mish: A Self Regularized Non-Monotonic Activation Function*, 2019, "
        "https://arxiv.org/abs/1908.08681",
    ),
    "sigmoid": Row(torch.sigmoid, nn.Sigmoid),
    "tanh": Row(torch.tanh, nn.Tanh),
}
_CALL = re.compile(r"(\w+)(?:\((.*)\))?")

# Module -> name, and the attributes that are its arguments.
_MODULES: dict[type, tuple[str, tuple[str, ...]]] = {nn.Identity: ("", ())}
_MODULES |= {
    row.module: (name, tuple(row.parameters))
    for name, row in ACTIVATIONS.items()
    if row.module is not None
}
_FORWARDS = {kind: kind.forward for kind in _MODULES}


def activation_name(activation: str | nn.Module | type[nn.Module]) -> str:
    """The name that the operators take, for a name, a module of torch.nn or its class."""
    if isinstance(activation, str):
        return _normalized_name(activation)
    if isinstance(activation, type) and activation in _MODULES:
        activation = activation()
    if type(activation) not in _MODULES:
        raise _unknown(activation)
    name, attributes = _MODULES[type(activation)]
    found = named(name, [getattr(activation, attribute) for attribute in attributes])
    if found is None:
        raise _unknown(activation)
    return found


def named(name: str, arguments: Sequence[object]) -> str | None:
    """The name that the operators take, for an activation of PyTorch and all of its arguments."""
    if name == "gelu":
        return {"none": "gelu", "tanh": "gelu_tanh"}.get(arguments[0])
    values = ", ".join([repr(float(argument)) for argument in arguments])
    return f"{name}({values})" if values else name


_names: dict[str, str] = {"": "", "identity": ""}  # of what has been asked for


def _normalized_name(activation: str) -> str:
    """In the spelling of Python's numbers, which the operators read as well."""
    if activation not in _names:
        arguments = _parsed(activation)[1]
        name = activation.partition("(")[0]
        _names[activation] = named(name, arguments) if arguments else name
    return _names[activation]


_normalized_name._dynamo_marked_constant = True  # a compiler would trace the regular expression


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
    if match is None or match[1] not in ACTIVATIONS:
        raise _unknown(activation)
    row = ACTIVATIONS[match[1]]
    if match[2] is None:
        return row.function, []
    try:
        arguments = [float(text) for text in match[2].split(",")]
    except ValueError:
        raise _unknown(activation) from None
    # a name has numbers in it only
    if len(arguments) != sum(isinstance(value, float) for value in row.parameters.values()):
        raise _unknown(activation)
    return row.function, arguments


_parsed._dynamo_marked_constant = True


def _unknown(activation: object) -> ValueError:
    names = ", ".join(["identity", *ACTIVATIONS])
    return ValueError(
        f"expected activation to be one of {names}, some with arguments, as in leaky_relu(0.1), or "
        f"such a module of torch.nn, got {activation!r}"
    )
