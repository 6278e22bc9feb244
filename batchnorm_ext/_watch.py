"""What a forward does beside calling modules and functions of its input."""

import dis
import gc
import inspect
import sys
from collections.abc import Callable
from types import (
    BuiltinFunctionType,
    CodeType,
    FrameType,
    FunctionType,
    MethodDescriptorType,
    ModuleType,
    WrapperDescriptorType,
)

from torch import nn

_MODULES = ("torch", "math", "operator", "functools", "itertools", "collections", "typing")
_OURS = ("torch", "batchnorm_ext")
# modules whose Python functions a forward may call
_ENTRIES = ("torch.fx", "torch.nn.functional", "torch.nn.modules", "torch._jit_internal")
_ENTRIES += ("torch.functional", "torch._tensor", "torch.jit", "torch.overrides", "batchnorm_ext")
_BUILTINS = ("builtins", "math", "_operator", "_functools", "itertools", "_collections")
_REFUSED = ("print", "open", "input", "exec", "eval", "id", "globals", "locals", "vars", "setattr")
_REFUSED += ("callable",)
_FUNCTIONS = (FunctionType, BuiltinFunctionType, MethodDescriptorType, WrapperDescriptorType)
_OF_NAMES = ("LOAD_ATTR", "LOAD_METHOD", "STORE_ATTR", "DELETE_ATTR")
_OF_CLASSES = (*_FUNCTIONS, classmethod, staticmethod)
_CONTAINERS = (list, dict, tuple, str, set, frozenset, int, float, bool, type(None), type)


class Watch:
    """Collects, while a forward is traced, reasons why its graph would not be all that it does."""

    def __init__(self, forward: Callable) -> None:
        self.forward = getattr(forward, "__code__", None)
        self.reasons: list[str] = []
        self.checked: set[CodeType] = set()

    def __enter__(self) -> "Watch":
        self.before, self.collects = sys.getprofile(), gc.isenabled()
        gc.disable()  # its callbacks would look as if the forward called them
        sys.setprofile(self._look)
        return self

    def __exit__(self, *error: object) -> None:
        sys.setprofile(self.before)
        if self.collects:
            gc.enable()

    def _look(self, frame: FrameType, event: str, argument: object) -> None:
        if event == "c_call" and self._is_of_forward(frame):
            self.reasons += _builtin_refusal(argument)
        elif event == "call":
            if self._is_of_forward(frame):
                if frame.f_code not in self.checked:
                    self.checked.add(frame.f_code)
                    self.reasons += _globals_refusal(frame) + _code_refusal(frame)
            elif frame.f_back is not None and self._is_of_forward(frame.f_back):
                self.reasons += _entry_refusal(frame)

    def _is_of_forward(self, frame: FrameType | None) -> bool:
        """Whether it is the frame of the forward or of what it calls, but not by way of torch."""
        if frame is None or is_torch(_home(frame)):
            return False
        while frame is not None and not is_torch(_home(frame)):
            if frame.f_code is self.forward:
                return True
            frame = frame.f_back
        if frame is None:
            return False
        # a property of the module, which is read by way of _trace
        getter = frame.f_code.co_name in ("__getattribute__", "__getattr__")
        return getter and _home(frame) == "batchnorm_ext._trace"


def is_torch(module: str) -> bool:
    return module.partition(".")[0] in _OURS


def _home(frame: FrameType) -> str:
    return frame.f_globals.get("__name__", "")


def _entry_refusal(frame: FrameType) -> list[str]:
    home, name = _home(frame), frame.f_code.co_name
    if home.startswith(_ENTRIES) or (home == "torch" and name in ("_assert", "is_tensor")):
        return []
    return [f"it calls {name} of {home}"]


def _builtin_refusal(function: BuiltinFunctionType) -> list[str]:
    home, name = getattr(function, "__module__", None), getattr(function, "__name__", "")
    owner = getattr(function, "__self__", None)
    if home is None and not isinstance(owner, ModuleType):
        torch_class = is_torch(type(owner).__module__)
        fine = type(owner) in _CONTAINERS or torch_class or owner is None
    elif is_torch(str(home)):
        fine = not ("enabled" in name or name.startswith(("get_", "set_", "_get", "_set")))
    else:
        fine = home in _BUILTINS and name not in _REFUSED
    return [] if fine else [f"it calls {name} of {home or type(owner).__qualname__}"]


def _code_refusal(frame: FrameType) -> list[str]:
    """What happens without a call."""
    reasons: list[str] = []
    owner: type | None = None  # the class of a program that was loaded last
    for instruction in dis.get_instructions(frame.f_code):
        kind, name = instruction.opname, instruction.argval
        if kind in ("LOAD_GLOBAL", "LOAD_NAME"):
            value = frame.f_globals.get(name)
            owner = value if isinstance(value, type) and not is_torch(value.__module__) else None
            if name == "type" and name not in frame.f_globals:
                reasons.append("it asks for a type")
        elif kind == "IMPORT_NAME" and name.partition(".")[0] not in (*_MODULES, "batchnorm_ext"):
            reasons.append(f"it imports {name or 'from its package'}")
        elif kind in ("STORE_GLOBAL", "DELETE_GLOBAL"):
            reasons.append(f"it sets the global {name}")
        elif kind == "MATCH_CLASS" or name in ("__class__", "__dict__") and kind in _OF_NAMES:
            reasons.append("it asks for a type" if name != "__dict__" else "it reads __dict__")
        elif kind in _OF_NAMES and owner is not None:
            value = inspect.getattr_static(owner, name, None)
            if not kind.startswith("LOAD") or not isinstance(value, _OF_CLASSES):
                reasons.append(f"it uses {owner.__name__}.{name}")
        if kind not in ("LOAD_GLOBAL", "LOAD_NAME", "COPY", "CACHE"):
            owner = None
    return reasons


def _globals_refusal(frame: FrameType) -> list[str]:
    code = frame.f_code
    names = {
        instruction.argval
        for instruction in dis.get_instructions(code)
        if instruction.opname in ("LOAD_GLOBAL", "LOAD_NAME")
    }
    values = {name: frame.f_globals[name] for name in names if name in frame.f_globals}
    if code.co_freevars:
        own = frame.f_back.f_code  # a comprehension, or the like, uses what its caller has made
        local = {*own.co_cellvars, *own.co_freevars}
        names = [name for name in code.co_freevars if name not in local]
        values |= {name: frame.f_locals.get(name) for name in names}
    reasons = [
        f"it uses the global {name}" for name, value in values.items() if not _is_code(value)
    ]
    return reasons + ["it uses torch.backends"] * ("backends" in code.co_names)


def _is_code(value: object) -> bool:
    """Whether it stays as it is: code and types, no objects or classes that hold settings."""
    if isinstance(value, ModuleType):
        return value.__name__.partition(".")[0] in (*_MODULES, "batchnorm_ext")
    if isinstance(value, type):
        return issubclass(value, (nn.Module, BaseException)) or is_torch(value.__module__)
    home = type(value).__module__
    if isinstance(value, _FUNCTIONS):
        return not is_bound_builtin(value)
    return value is None or home in ("typing", "types", "torch._ops")


def is_bound_builtin(value: object) -> bool:
    """Whether it is a method, as ``append`` of some list."""
    owner = getattr(value, "__self__", None) if isinstance(value, BuiltinFunctionType) else None
    return owner is not None and not isinstance(owner, (ModuleType, type))
