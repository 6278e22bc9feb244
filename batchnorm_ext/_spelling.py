"""How the nodes of a torch-level graph spell a norm, an addition and an activation."""

import inspect
import operator
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from batchnorm_ext import _chain, functional
from batchnorm_ext._activations import ACTIVATIONS, is_activation, named

OPS = torch.ops.batchnorm_ext


def _spellings() -> dict[object, tuple[str, bool]]:
    """Function, or name of a method -> name of the activation, and whether it is done in place."""
    found: dict[object, tuple[str, bool]] = {}
    for name in ACTIVATIONS:
        for package in (F, torch):
            for spelled, in_place in ((name, False), (f"{name}_", True)):
                if hasattr(package, spelled):
                    found[getattr(package, spelled)] = name, in_place
        if hasattr(Tensor, name):
            found |= {name: (name, False), f"{name}_": (name, True)}
            found[getattr(Tensor, name)] = name, False
            found[getattr(Tensor, f"{name}_", None)] = name, True
    return found


_ACTIVATIONS = _spellings()
_ADDITIONS = {operator.add: False, operator.iadd: True, torch.add: False, Tensor.add: False}
_ADDITIONS |= {
    _chain.iadd: True,
    "add": False,
    "add_": True,
    "__add__": False,
    "__iadd__": True,
    Tensor.add_: True,
}


@dataclass
class Activation:
    of: fx.Node
    name: str  # with an underscore before it if it is done in place; of a module its path
    is_module: bool = False


@dataclass
class Addition:
    first: fx.Node
    second: fx.Node
    in_place: bool  # written into the first


@dataclass
class Norm:
    """A node that normalizes ``input``.

    ``replacement(*arguments, activation, residual, written)`` also does what follows; of a module
    the arguments are the module and ``input``.
    """

    node: fx.Node
    input: fx.Node
    path: str = ""  # of a module
    module: nn.Module | None = None
    replacement: Callable | None = None
    arguments: tuple = ()
    operator: fx.Node | None = None  # of this library; ``node`` is its first result


def activation_of(node: fx.Node, modules: dict[str, nn.Module]) -> Activation | None:
    if node.op == "call_module":
        of = _only_argument(node)
        if of is None or not is_activation(modules[node.target]):
            return None
        return (
            None if type(modules[node.target]) is nn.Identity else Activation(of, node.target, True)
        )
    if node.op not in ("call_function", "call_method") or node.target not in _ACTIVATIONS:
        return None
    name, in_place = _ACTIVATIONS[node.target]
    defaults = ACTIVATIONS[name].parameters
    values = _bind(node, ["input", *defaults, "inplace"])
    of = values.pop("input", None) if values is not None else None
    if not isinstance(of, fx.Node):
        return None
    written = values.pop("inplace", False)
    values = defaults | values
    if type(written) is not bool or any(isinstance(value, fx.Node) for value in values.values()):
        return None
    name = named(name, list(values.values()))
    return None if name is None else Activation(of, f"_{name}" if in_place or written else name)


def addition_of(node: fx.Node) -> Addition | str | None:
    """None if it is no addition; a reason if it is not the plain sum of two values."""
    if node.op not in ("call_function", "call_method") or node.target not in _ADDITIONS:
        return None
    values = _bind(node, ["input", "other", "alpha"])
    if values is None:
        return "an addition with further arguments"
    first, second = values.get("input"), values.get("other")
    if not (isinstance(first, fx.Node) and isinstance(second, fx.Node)):
        return "the addition of a number"
    if first is second:
        return "the addition of a value to itself"
    if values.get("alpha", 1) != 1:
        return "a scaled addition"
    return Addition(first, second, _ADDITIONS[node.target])


def norm_of(node: fx.Node, modules: dict[str, nn.Module]) -> Norm | None:
    if node.op == "call_module":
        module, of = modules[node.target], _only_argument(node)
        last = _chain.last_layer(module)
        if of is None or type(last) not in _chain.FUSED_NORMS:
            return None
        return Norm(node, of, node.target, last, _chain.norm_then)
    if node.op != "call_function":
        return None
    if node.target is operator.getitem and isinstance(node.args[0], fx.Node):
        return _norm_of_operator(node, node.args[0])
    if node.target not in _FUNCTIONS:
        return None
    signature, make = _FUNCTIONS[node.target]
    try:
        bound = signature.bind(*node.args, **node.kwargs)
    except TypeError:
        return None
    bound.apply_defaults()
    return make(node, *bound.args)


def is_pass(node: fx.Node, modules: dict[str, nn.Module]) -> bool:
    """Whether the node is an identity that no hook sees."""
    if node.op != "call_module" or _only_argument(node) is None:
        return False
    module = modules[node.target]
    return type(module) is nn.Identity and _chain.is_plain(module)


def _batch_norm(node, input, mean, var, weight, bias, training, momentum, eps) -> Norm | None:
    numbers = isinstance(momentum, (int, float)) and isinstance(eps, (int, float))
    if not isinstance(input, fx.Node) or not isinstance(training, bool) or not numbers:
        return None
    arguments = (input, mean, var, weight, bias, training, momentum, eps)
    return Norm(node, input, replacement=_chain.batch_norm_then, arguments=arguments)


def _instance_norm(node, input, mean, var, weight, bias, use_input_stats, momentum, eps):
    of_input = mean is None and var is None and use_input_stats is True
    if not isinstance(input, fx.Node) or not of_input or not isinstance(eps, (int, float)):
        return None
    arguments = (input, weight, bias, eps)
    return Norm(node, input, replacement=_chain.instance_norm_then, arguments=arguments)


def _group_norm(node, input, num_groups, weight, bias, eps) -> Norm | None:
    if not isinstance(input, fx.Node) or not isinstance(num_groups, int):
        return None
    arguments = (input, num_groups, weight, bias, eps)
    return Norm(node, input, replacement=_chain.group_norm_then, arguments=arguments)


_FUNCTIONS = {
    function: (inspect.signature(getattr(F, make.__name__[1:])), make)
    for make in (_batch_norm, _instance_norm, _group_norm)
    for function in (getattr(F, make.__name__[1:]), getattr(functional, make.__name__[1:]))
}


_OPERATORS = (
    OPS.batch_norm.default,
    OPS.batch_norm_update.default,
    OPS.sync_batch_norm.default,
)


def _norm_of_operator(node: fx.Node, call: fx.Node) -> Norm | None:
    """The first result of an operator: Dynamo traces into the layers of this library."""
    if node.args[1] != 0 or call.target not in _OPERATORS:
        return None
    names = [argument.name for argument in call.target._schema.arguments]
    if "activation" not in names:
        return None
    values = dict(zip(names, call.args, strict=False)) | call.kwargs
    if values.get("residual") is not None or values.get("activation", ""):
        return None
    return Norm(node, call.args[0], operator=call)


def _only_argument(node: fx.Node) -> fx.Node | None:
    one = len(node.args) == 1 and not node.kwargs and isinstance(node.args[0], fx.Node)
    return node.args[0] if one else None


def _bind(node: fx.Node, names: list[str]) -> dict[str, object] | None:
    """Arguments by name; None if there are others."""
    aliases = {"self": "input", "x": "input"}
    kwargs = {aliases.get(name, name): value for name, value in node.kwargs.items()}
    if len(node.args) > len(names) or not kwargs.keys() <= set(names):
        return None
    return dict(zip(names, node.args, strict=False)) | kwargs


def writes(node: fx.Node, modules: dict[str, nn.Module]) -> bool:
    """Whether the node may write into what it is given."""
    if node.op in ("placeholder", "get_attr", "output"):
        return False
    if node.op == "call_module":
        return any(_layer_writes(layer) for layer in modules[node.target].modules())
    if node.op == "call_method":
        name = node.target
        in_place = name.endswith("_") and not name.endswith("__")
        return in_place or name.startswith(("__i", "__set"))
    if node.target in (*_OPERATORS, *_FUNCTIONS):
        return False  # but for the running statistics
    if node.target in _chain.IN_PLACE:
        return True
    name = getattr(node.target, "__name__", "_")
    home = (getattr(node.target, "__module__", None) or "torch").partition(".")[0]
    if home not in ("torch", "operator", "_operator", "math", "builtins", "batchnorm_ext"):
        return True
    if isinstance(node.target, torch._ops.OpOverload):
        return node.target._schema.is_mutable
    if home in ("operator", "_operator"):
        return name in ("setitem", "delitem") or getattr(operator, f"__{name}__", None) in _WRITERS
    return name.endswith("_") or "out" in node.kwargs or _is_in_place(node)


def switches(node: fx.Node) -> bool:
    """Whether functions do something else after the node: autograd, autocast, transforms."""
    if node.op != "call_function" or getattr(node.target, "__module__", None) is None:
        return False
    home, name = node.target.__module__.partition(".")[0], node.target.__name__
    return home == "torch" and (name.startswith(_SWITCHES) or name.endswith("_nesting"))


_SWITCHES = ("set_", "_set_", "_enter_", "_exit_", "_push_", "_pop_", "_saved_tensors_hooks_")
_WRITERS = {function for name, function in vars(operator).items() if name.startswith("__i")}
_WRITERS -= {operator.inv, operator.invert, operator.is_, operator.index}


def _is_in_place(node: fx.Node) -> bool:
    try:
        bound = inspect.signature(node.target).bind(*node.args, **node.kwargs)
    except (TypeError, ValueError):  # builtins have no signature, and no such argument
        return bool(node.kwargs.get("inplace", False))
    return bool(bound.arguments.get("inplace", False))


def _layer_writes(layer: nn.Module) -> bool:
    known = type(layer).__module__.startswith(("torch.nn.modules.", "batchnorm_ext."))
    plain = known or _chain.is_sequential(layer)
    return not plain or not _chain.is_plain(layer) or bool(getattr(layer, "inplace", False))
