"""The graph of one forward, and all that it depends on besides its arguments.

torch.fx takes for granted that a forward does the same in every call. Here what it reads is noted,
for the caller to compare later, and a forward that does what its graph does not show is refused.
"""

import builtins
import inspect
import sys
import threading
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import BuiltinFunctionType, FunctionType, MethodType
from typing import NoReturn, get_args

import torch
import torch.utils._pytree as pytree
from torch import Tensor, fx, nn
from torch.fx.proxy import TraceError
from torch.overrides import TorchFunctionMode

from batchnorm_ext import _chain
from batchnorm_ext._watch import Watch, is_bound_builtin, is_torch

_OF_MODULES = frozenset(vars(nn.Module())) - {"training"}
_PLAIN = (type(None), bool, int, float, complex, str, bytes, torch.Size)
_PLAIN += (torch.dtype, torch.device, torch.memory_format, torch.layout, type)
_PLAIN += (FunctionType, BuiltinFunctionType)
_CODE = (FunctionType, MethodType, BuiltinFunctionType, property, classmethod, staticmethod)
_CODE += (type(object.__init__), type(str.join))
# attributes of a tensor that may be None
_MAY_BE_NONE = ("grad", "grad_fn", "_grad", "_grad_fn", "_base", "_backward_hooks")


@dataclass
class Dependencies:
    """What a graph holds for: values of attributes, by the path of their module and their name."""

    reads: dict[tuple[str, str], object] = field(default_factory=dict)
    reasons: list[str] = field(default_factory=list)  # why it is no graph
    parents: set[str] = field(default_factory=set)  # paths of modules whose children are read

    def refuse(self, reason: str) -> NoReturn:
        self.reasons.append(reason)  # a forward may catch what it raises
        raise TraceError(reason)

    def note(self, path: str, name: str, value: object) -> None:
        if not _is_constant(value):
            what = f"{path}.{name}" if path else name
            self.refuse(f"it reads {what}, a {type(value).__qualname__}")
        if self.reads.setdefault((path, name), value) is not value:
            self.refuse(f"it reads {name}, which changes meanwhile")


def _is_constant(value: object) -> bool:
    if isinstance(value, tuple):
        return all(map(_is_constant, value))
    return isinstance(value, _PLAIN) and not is_bound_builtin(value)


class _Recorded:
    """A module that notes which attributes are read, and refuses to be changed."""

    def __getattribute__(self, name: str) -> object:
        value = super().__getattribute__(name)
        members = super().__getattribute__("__dict__")
        if name in _OF_MODULES or name.startswith("__") or "_recorded" not in members:
            return value
        kind = super().__getattribute__("__class__")
        owner = next((base for base in kind.__mro__ if name in vars(base)), None)
        if name in members or owner is None or not isinstance(vars(owner)[name], _CODE):
            dependencies, path = members["_recorded"]
            dependencies.note(path, name, value)
        return value

    def __getattr__(self, name: str) -> object:
        dependencies, path = vars(self)["_recorded"]
        try:
            value = super().__getattr__(name)
        except AttributeError:
            if not name.startswith("__"):
                dependencies.refuse(f"it looks for {name}, which there is not")
            raise
        if value is None:  # a parameter, buffer or module that there is not
            dependencies.note(path, name, value)
        elif isinstance(value, nn.Module):
            dependencies.parents.add(path)
        return value

    def __setattr__(self, name: str, value: object) -> None:
        vars(self)["_recorded"][0].refuse(f"it sets {name}")

    def __delattr__(self, name: str) -> None:
        vars(self)["_recorded"][0].refuse(f"it deletes {name}")


def _twin(
    module: nn.Module, path: str, dependencies: Dependencies, training: bool | None, known: dict
) -> nn.Module:
    """A copy of all modules, with the same parameters; ``training`` None keeps the mode of each."""
    if module in known:
        return known[module]
    kind = type(module)
    namespace = {"__module__": kind.__module__, "__qualname__": kind.__qualname__}
    twin = object.__new__(type(kind.__name__, (_Recorded, kind), namespace))
    known[module] = twin
    members = dict(vars(module), _recorded=(dependencies, path))
    if training is not None:
        members["training"] = training
    members["_modules"] = {
        name: child and _twin(child, f"{path}.{name}".lstrip("."), dependencies, training, known)
        for name, child in module._modules.items()
    }
    object.__setattr__(twin, "__dict__", members)
    return twin


class _Proxy(fx.Proxy):
    """Records operators in place, and refuses attributes of which only the value knows."""

    def __getattr__(self, name: str) -> fx.Proxy:
        known = self.node.op != "placeholder" or hasattr(Tensor, name)
        if name in _MAY_BE_NONE or not (known or name.startswith("__")):
            self.tracer.dependencies.refuse(f"it reads {name} of a value")
        return super().__getattr__(name)


def _in_place(function):
    def write(self, other: object) -> fx.Proxy:
        return self.tracer.create_proxy("call_function", function, (self, other), {})

    return write


for _function in _chain.IN_PLACE:
    setattr(_Proxy, f"__{_function.__name__}__", _in_place(_function))


_is_instance, _one_at_a_time = isinstance, threading.Lock()


def _isinstance(value: object, kinds: object) -> bool:
    """What a forward is given are tensors. Said here, not by ``__class__``, which torch's C++ code
    believes too, and then reads a tensor that there is not."""
    asking = sys._getframe(1).f_globals.get("__name__", "")
    if not _is_instance(value, fx.Proxy) or is_torch(asking):
        return _is_instance(value, kinds)
    kinds = [one for kind in pytree.tree_leaves(kinds) for one in get_args(kind) or (kind,)]
    if type(value) is not _Proxy or value.node.op != "placeholder" or any(map(_narrows, kinds)):
        value.tracer.dependencies.refuse("it asks for the type of a value")
    return Tensor in kinds or object in kinds


def _narrows(kind: type) -> bool:
    """Whether some tensors are of that type and others are not."""
    if kind is Tensor or issubclass(kind, nn.Module):
        return False
    return issubclass(kind, Tensor) or is_torch(kind.__module__)


@contextmanager
def _inputs_are_tensors():
    with _one_at_a_time:
        builtins.isinstance = _isinstance
        try:
            yield
        finally:
            builtins.isinstance = _is_instance


class _OfInputs(TorchFunctionMode):
    """Refuses functions of no input, whose result would be a constant of the graph."""

    def __init__(self, dependencies: Dependencies) -> None:
        super().__init__()
        self.dependencies = dependencies

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        leaves = pytree.tree_leaves((args, kwargs))
        if not any(type(leaf) in (_Proxy, fx.proxy.Attribute) for leaf in leaves):
            name = getattr(function, "__name__", function)
            if name not in ("__hash__", "__get__"):
                self.dependencies.refuse(f"it calls {name} on nothing that it is given")
        return function(*args, **kwargs)


class Tracer(fx.Tracer):
    """The graph of the forward of one module, in which all others are leaves.

    ``lists``: for each parameter that is a list, its number of tensors.
    """

    proxy_buffer_attributes = True

    def __init__(
        self, module: nn.Module, lists: dict[str, int], training: bool | None = None
    ) -> None:
        super().__init__()
        self.lists, self.dependencies = lists, Dependencies()
        self.parameters = list(inspect.signature(module.forward).parameters.values())
        kinds = {parameter.kind for parameter in self.parameters}
        if not kinds <= {inspect.Parameter.POSITIONAL_OR_KEYWORD}:
            raise TraceError("it takes any number of arguments")
        home = getattr(type(module).forward, "__globals__", {}).get("__name__", "torch")
        if is_torch(home):
            raise TraceError("it is torch's own, or decorated by it")
        twin = _twin(module, "", self.dependencies, training, {})
        watch, of_inputs = Watch(type(module).forward), _OfInputs(self.dependencies)
        with watch, of_inputs, _inputs_are_tensors():
            graph = self.trace(twin)  # which becomes self.graph
        if reasons := self.dependencies.reasons + watch.reasons:
            raise TraceError(reasons[0])
        self.check(graph, module)

    def check(self, graph: fx.Graph, module: nn.Module) -> None:
        for node in graph.nodes:
            if node.op == "get_attr":
                owner, _, name = node.target.rpartition(".")
                members = vars(module.get_submodule(owner))
                if name not in members["_parameters"] and name not in members["_buffers"]:
                    raise TraceError(
                        f"it uses {node.target}, which is neither parameter nor buffer"
                    )

    def create_args_for_root(self, root_fn, is_module: bool, concrete_args=None):
        arguments: list[object] = [self.root]
        for parameter in self.parameters:
            name = parameter.name
            if parameter.default is not parameter.empty:
                if not _is_constant(parameter.default):
                    raise TraceError(f"the default of its argument {name} is no constant")
                arguments.append(parameter.default)
            elif name in self.lists:
                names = [f"{name}_{place}" for place in range(self.lists[name])]
                arguments.append([self.create_proxy("placeholder", own, (), {}) for own in names])
            else:
                arguments.append(self.create_proxy("placeholder", name, (), {}))
        return root_fn, arguments

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        if not module_qualified_name:
            raise TraceError("it calls itself")
        return True

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Proxy(node, self)
