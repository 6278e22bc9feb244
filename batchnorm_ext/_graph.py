"""Which modules of a model are called one after the other, with nothing else between them."""

import copy
import inspect
import warnings
from collections import Counter
from dataclasses import dataclass, field

import torch.utils._pytree as pytree
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd

NORMS = (_NormBase, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm)
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


@dataclass
class Call:
    """A call of the module ``name``, which is not looked into."""

    name: str
    module: nn.Module
    obstacle: str = ""  # why the module cannot be changed for this call alone

    def __str__(self) -> str:
        kind = type(self.module)
        own = not kind.__module__.startswith(("torch.nn.", "batchnorm_ext."))
        return f"{self.name} ({f'{kind.__module__}.' if own else ''}{kind.__qualname__})"


@dataclass
class Chain:
    """Calls that each take the result of the one before, and nothing else. Nothing else uses it.

    ``before`` and ``after`` say what the first is given and what uses the result of the last.
    """

    calls: list[Call]
    before: str
    after: str


@dataclass
class Report:
    """What has been done to the layers of a model: path -> what became of it, and why not."""

    verb: str
    done: dict[str, str] = field(default_factory=dict)
    left: dict[str, str] = field(default_factory=dict)
    note: str = ""

    def __str__(self) -> str:
        lines = [f"{self.verb} {len(self.done)} of {len(self.done) + len(self.left)} layers"]
        lines += [f"  {self.verb} {name} {outcome}" for name, outcome in self.done.items()]
        lines += [f"  left {name}: {reason}" for name, reason in self.left.items()]
        return "\n".join(lines + ([self.note] if self.note else []))


def chains(model: nn.Module) -> tuple[list[Chain], str]:
    """The chains of ``model``, and a note on what they do not cover.

    By torch.fx, with the default of each optional argument, where the model can be traced;
    otherwise each ``nn.Sequential`` is a chain.
    """
    try:
        return _Traced(model).chains(), ""
    except Exception as error:  # whatever a forward raises that is not given tensors
        reason = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
        note = "only neighbours in nn.Sequential were tried: torch.fx cannot trace the model"
        return _of_sequentials(model), f"{note} ({reason})"


def is_hooked(module: nn.Module) -> bool:
    return any(getattr(module, hooks) for hooks in _HOOKS)


class _Traced(fx.Tracer):
    """The graph of a model, in which layers with parameters are leaves."""

    proxy_buffer_attributes = True  # reading a buffer is a node of the graph, too

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        if "forward" in model.__dict__:
            raise TypeError("the model has a forward of its own")
        self.model = dict(model.named_modules())
        # what a forward leaves in the model stays out of it: a copy, with the same parameters
        # and without hooks, which would run now
        memo = {id(parameter): parameter for parameter in model.parameters()}
        for module in self.model.values():
            memo |= {id(hooks): type(hooks)() for hooks in map(vars(module).get, _HOOKS)}
            # as those of pruned layers, which cannot be copied
            memo |= {id(own): own for own in vars(module).values() if isinstance(own, Tensor)}
        twin = copy.deepcopy(model, memo)
        self.hooked = {
            module: name
            for (name, module), original in zip(
                twin.named_modules(), self.model.values(), strict=True
            )
            if is_hooked(original)
        }
        self.seen_by: dict[fx.Node, str] = {}  # node -> who sees its value beside the graph
        parameters = inspect.signature(twin.forward).parameters.values()
        defaults = {p.name: p.default for p in parameters if p.default is not p.empty}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about values that the graph does not check
            graph = self.trace(twin, defaults)
        for name, module in twin.named_modules():
            self._mark(vars(module), f"an attribute of {name or 'the model'}")
        self.calls = {
            node: Call(node.target, self.model[node.target])
            for node in graph.nodes
            if node.op == "call_module"
        }
        times = Counter(call.module for call in self.calls.values())
        read = {node.target.rpartition(".")[0] for node in graph.nodes if node.op == "get_attr"}
        for call in self.calls.values():
            if times[call.module] > 1:
                call.obstacle = f"called {times[call.module]} times"
            elif call.name in read:
                call.obstacle = "read by the forward of another module"

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        layer = isinstance(m, (*NORMS, _ConvNd, nn.Linear))
        return layer or super().is_leaf_module(m, module_qualified_name)

    def call_module(self, m: nn.Module, forward, args: tuple, kwargs: dict) -> object:
        result = super().call_module(m, forward, args, kwargs)
        if m in self.hooked:
            self._mark((args, kwargs, result), f"a hook of {self.hooked[m]}")
        return result

    def _mark(self, values: object, observer: str) -> None:
        for value in pytree.tree_leaves(values):
            if isinstance(value, fx.Proxy):
                self.seen_by[value.node] = observer

    def chains(self) -> list[Chain]:
        found: list[Chain] = []
        chain_of: dict[fx.Node, Chain] = {}
        for node, call in self.calls.items():
            source = self._source(node)
            if source in self.calls and self._is_link(source):
                chain = chain_of[source]
                chain.calls.append(call)
            else:
                chain = Chain([call], self._before(node), "")
                found.append(chain)
            chain_of[node] = chain
            chain.after = self._after(node)
        return found

    def _source(self, node: fx.Node) -> fx.Node | None:
        """What the call of a module is given, if that is one value and nothing else."""
        arguments = [*node.args, *node.kwargs.values()]
        one = len(arguments) == 1 and isinstance(arguments[0], fx.Node)
        return arguments[0] if one else None

    def _is_link(self, node: fx.Node) -> bool:
        users = list(node.users)
        return node not in self.seen_by and len(users) == 1 and users[0] in self.calls

    def _before(self, node: fx.Node) -> str:
        source = self._source(node)
        if source is None:
            return "several arguments"
        name = self._describe(source)
        return f"{name} and after that {self._after(source)}" if source in self.calls else name

    def _after(self, node: fx.Node) -> str:
        if node in self.seen_by:
            return self.seen_by[node]
        users = list(node.users)
        names = ", ".join(map(self._describe, users)) or "nothing"
        if len(users) == 1 and users[0] in self.calls and self._source(users[0]) is None:
            return f"{names} with further arguments"
        return names

    def _describe(self, node: fx.Node) -> str:
        if node in self.calls:
            return str(self.calls[node])
        name = getattr(node.target, "__name__", node.target)
        kinds = {"placeholder": "the input", "output": "the", "call_method": "the method"}
        return f"{kinds.get(node.op, 'the function')} {name}"


def _of_sequentials(model: nn.Module) -> list[Chain]:
    """Their children, each next to its neighbours unless hooks see what lies between."""
    places = Counter(module for _, module in model.named_modules(remove_duplicate=False))
    names = {module: name for name, module in model.named_modules()}
    found: list[Chain] = []
    for path, sequential in model.named_modules():
        if type(sequential).forward is not nn.Sequential.forward or "forward" in vars(sequential):
            continue
        before = f"the input of {path or 'the model'}"
        previous = None
        for module in sequential._modules.values():
            call = Call(names[module], module)
            if places[module] > 1:
                call.obstacle = f"in {places[module]} places"
            if previous is not None and (is_hooked(module) or is_hooked(previous.module)):
                found[-1].after, before = f"hooks and {call}", f"{previous} and hooks"
                previous = None
            if previous is None:
                found.append(Chain([], before, ""))
            found[-1].calls.append(call)
            found[-1].after = f"the end of {path or 'the model'}"
            previous = call
    return found
