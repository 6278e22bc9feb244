"""Forwards of existing modules, rewritten: how they are put in place, and when they hold."""

import functools
import importlib
from dataclasses import dataclass
from types import ModuleType

from torch import Tensor, fx, nn

from batchnorm_ext import _chain, _ops

_KEY = "_batchnorm_ext_rewrites"


@dataclass
class Rewrite:
    """The code of a forward, and what has to be as it was when the code was made.

    ``parameters``: the name of each with "tensor", with the number of tensors for a list, or with
    a tuple of its default value. ``reads``: path of a module, name and value of its attribute.
    ``members``: path of a module, and of each child the name and what it is. ``passes``: paths of
    modules that are left out because they do nothing.
    """

    source: str
    names: dict[str, object]  # globals of the code
    parameters: list[tuple[str, object]]
    reads: list[tuple[str, str, object]]
    members: list[tuple[str, tuple]]
    passes: list[str]

    @classmethod
    def of(cls, graph: fx.Graph, parameters: list, reads: list, members: list, passes: list):
        code = graph.python_code("self")
        return cls(code.src, dict(code.globals), parameters, reads, members, passes)

    def __post_init__(self) -> None:
        names = dict(self.names)
        exec(compile(self.source, "<forward fused by batchnorm_ext>", "exec"), names)
        self.function = names["forward"]

    def __getstate__(self) -> dict:
        names = {
            name: _Import(value.__name__) if isinstance(value, ModuleType) else value
            for name, value in self.names.items()
        }
        return {**vars(self), "names": names, "function": None}

    def __setstate__(self, state: dict) -> None:
        names = {
            name: value.module() if isinstance(value, _Import) else value
            for name, value in state["names"].items()
        }
        vars(self).update(state, names=names)
        self.__post_init__()

    def __deepcopy__(self, memo: dict) -> "Rewrite":
        return self  # nothing in it belongs to one model

    def holds(self, module: nn.Module) -> bool:
        """Whether the module is as it was when the code was made."""
        for path, name, expected in self.reads:
            value = getattr(_child(module, path), name, self)
            if value is not expected and (type(value) is not type(expected) or value != expected):
                return False
        for path, members in self.members:
            own = _child(module, path)
            if own is None or members_of(own) != members:
                return False
        for path in self.passes:
            own = _child(module, path)
            if type(own) is not nn.Identity or not _chain.is_plain(own):
                return False
        return True

    def tensors(self, args: tuple, kwargs: dict) -> list[Tensor] | None:
        """The arguments that the code takes; None where it does not hold for these."""
        rest = {name for name, _ in self.parameters[len(args) :]}
        if len(args) > len(self.parameters) or not kwargs.keys() <= rest:
            return None
        found: list[Tensor] = []
        for place, (name, kind) in enumerate(self.parameters):
            if place < len(args):
                value = args[place]
            elif name in kwargs:
                value = kwargs[name]
            elif isinstance(kind, tuple):
                continue
            else:
                return None
            if kind == "tensor":
                values = [value]
            elif isinstance(kind, tuple):
                if value is not kind[0]:
                    return None
                continue
            elif type(value) is list and len(value) == kind:
                values = value
            else:
                return None
            if not all(isinstance(one, Tensor) for one in values):
                return None
            found += values
        return found


@dataclass
class _Import:
    name: str

    def module(self) -> ModuleType:
        return importlib.import_module(self.name)


def _child(module: nn.Module, path: str) -> nn.Module | None:
    for name in path.split(".") if path else ():
        if module is None:
            return None
        module = module._modules.get(name)
    return module


def members_of(module: nn.Module) -> tuple:
    """Names of the children, and what a graph takes for granted of each: its class, which a forward
    may ask for, and whether it writes into what it is given, where hooks do not see it."""
    return tuple(
        (name, child if child is None else (_class_name(type(child)), _writes(child)))
        for name, child in module._modules.items()
    )


def _writes(module: nn.Module) -> bool:
    return bool(module.__dict__.get("inplace")) and _chain.is_plain(module)


_class_names: dict[type, str] = {}


def _class_name(kind: type) -> str:
    """The same before and after fusing and converting."""
    name = _class_names.get(kind)
    if name is None:
        base = vars(kind).get("_batchnorm_ext_base", kind)
        home = base.__module__
        if home.startswith(("torch.nn.", "batchnorm_ext.")):
            home = "torch"
        name = _class_names[kind] = f"{home}.{base.__qualname__}"
    return name


_class_name._dynamo_marked_constant = True  # a compiler would guard the dictionary


def install(module: nn.Module, rewrites: list[Rewrite]) -> None:
    """Let the module use the rewritten forwards where they hold; an ``nn.Sequential`` has none."""
    if rewrites:
        module.__dict__[_KEY] = rewrites
    if not is_installed(module):
        module.__class__ = _class_of(type(module))


def is_installed(module: nn.Module) -> bool:
    return "_batchnorm_ext_base" in vars(type(module))


def unfuse(model: nn.Module) -> None:
    """Undo :func:`install` in all modules of a model."""
    for module in model.modules():
        if is_installed(module):
            module.__dict__.pop(_KEY, None)
            module.__class__ = type(module)._batchnorm_ext_base


@functools.cache
def _class_of(base: type) -> type:
    """A subclass of ``base`` with another forward. Pickle stores ``base``, and makes it again."""
    as_fused = base.forward

    if as_fused is nn.Sequential.forward:

        def forward(self, input):
            return _chain.run_sequential(list(self._modules.values()), input)

        forward.runs_sequential = True
    else:

        def forward(self, *args, **kwargs):
            if base.forward is as_fused and not _ops.leaves_process():
                for rewrite in self.__dict__.get(_KEY, ()):
                    if rewrite.holds(self):
                        tensors = rewrite.tensors(args, kwargs)
                        if tensors is not None:
                            return rewrite.function(self, *tensors)
            return as_fused(self, *args, **kwargs)

    def reduce(self, protocol):
        function, (kind, *arguments), *rest = base.__reduce_ex__(self, max(protocol, 2))
        return _new, (base, *arguments), *rest

    forward.__wrapped__ = as_fused  # what torch.jit.script compiles, and inspect.signature shows
    forward.__name__, forward.__qualname__ = "forward", as_fused.__qualname__
    namespace = {"forward": forward, "__reduce_ex__": reduce, "_batchnorm_ext_base": base}
    namespace |= {"__module__": base.__module__, "__qualname__": base.__qualname__}
    return type(base.__name__, (base,), namespace)


def _new(base: type, *arguments) -> nn.Module:
    kind = _class_of(base)
    return kind.__new__(kind, *arguments)
