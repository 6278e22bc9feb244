"""Fusing norms, additions and activations of an existing model."""

import inspect
import warnings
from itertools import zip_longest
from typing import Literal, TypeVar, overload

from torch import fx, nn

from batchnorm_ext import _chain
from batchnorm_ext._compare import compare
from batchnorm_ext._graph import NORMS, Call, Report
from batchnorm_ext._rewrite import Rewrite, install, members_of, unfuse
from batchnorm_ext._trace import Tracer
from batchnorm_ext.convert import convert
from batchnorm_ext.fusion import Fusions
from batchnorm_ext.modules import LayerNorm, RMSNorm

__all__ = ["fuse"]

Module = TypeVar("Module", bound=nn.Module)

_UNFUSED = (nn.LayerNorm, LayerNorm, nn.RMSNorm, RMSNorm, nn.SyncBatchNorm)


@overload
def fuse(
    model: Module, example_inputs: object = None, report: Literal[False] = False
) -> Module: ...
@overload
def fuse(
    model: Module, example_inputs: object = None, *, report: Literal[True]
) -> tuple[Module, Report]: ...
def fuse(
    model: Module, example_inputs: object = None, report: bool = False
) -> Module | tuple[Module, Report]:
    r"""Make one pass through memory of each norm, addition and activation in a model.

    .. math:: y = \phi(\mathrm{norm}(x) + r)

    Source: Ioffe & Szegedy 2015, algorithm 1, with what stands around it in a network: see
    :func:`batchnorm_ext.functional.batch_norm_act`.

    Converts the layers (:func:`convert`) and rewrites the forwards that call them. Takes batch,
    instance and group normalization, and this library's ``SyncBatchNorm``, followed by an
    activation, by an addition, or by an addition and an activation, in any spelling: modules,
    functions, methods, operators, in place or not. Of two norms that are added one takes the result
    of the other as what it adds. Each forward is traced by ``torch.fx`` alone, with all modules
    that it calls as they are, so that a model need not be traceable as a whole; ``nn.Sequential``,
    and subclasses with its forward, run their layers pair by pair.

    A forward stays as it is, with the reason in the report, where the graph does not show all that
    it does: where it branches on a tensor, sets an attribute, reads lists or globals, calls what is
    no function of its input. A rewritten one goes with the attributes that the original reads,
    ``training`` and those of other modules among them: in any call where one of them has another
    value, or an argument is not a tensor, the original runs. In the same way each fused call looks
    first, and goes step by step where a hook has been registered since, a layer has been replaced,
    or the residual is of another shape or dtype. A norm is left where its value is used by anything
    else, returned or seen by hooks, and where something may write to what it needs.

    Args:
        model: any module. In place: the modules, parameters and buffers (shared ones stay shared),
            hooks and names are those of before; modules with a rewritten forward get a class of the
            same name, derived from theirs, which ``pickle`` and ``copy.deepcopy`` take.
            :func:`revert` undoes it. Fusing twice is harmless. Parameters and inputs: of any shape,
            in float32, bfloat16 or float16 on CPU and CUDA, in float64 on the CPU; others run step
            by step.
        example_inputs: a tensor, or a tuple of arguments. A copy of the model runs on them before
            and after, in float64, and outputs and gradients are compared.
        report: also return what has been done.

    Returns:
        ``model``; with ``report=True`` also an object with ``done`` and ``left``, from the path of
        each norm to what became of it or why it was left, and a readable ``str``.

    Raises:
        RuntimeError: the two models differ on the example inputs. The model is as before.

    Example::

        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
        >>> model, report = batchnorm_ext.fuse(model, torch.randn(2, 3, 8, 8), report=True)
        >>> print(report)
        fused 1 of 1 layers
          fused 1 with 2 (ReLU)
    """
    before = [(module, vars(module).copy(), type(module)) for module in model.modules()]
    unfuse(model)
    try:
        plan = _Plan(model)
        if example_inputs is not None:
            compare(model, plan.apply, example_inputs)
    except BaseException:
        for module, members, kind in before:
            module.__class__ = kind
            vars(module).update(members)
        raise
    plan.apply(model)
    return (model, plan.report) if report else model


class _Plan:
    """What is to be rewritten, by paths, so that it can be done to a copy of the model, too."""

    def __init__(self, model: nn.Module) -> None:
        self.report = Report("fused")
        self.rewrites: dict[str, list[Rewrite]] = {}  # none: an nn.Sequential
        self.names = {module: name for name, module in model.named_modules()}
        # the arguments that each module is given as lists, and of how many tensors
        self.lists: dict[nn.Module, dict[str, int]] = {}
        failures: dict[str, str] = {}
        for path, module in model.named_modules():
            if _chain.is_sequential(module):
                self._look_into_sequential(path, module)
            elif _has_forward_with_norms(module):
                try:
                    self._look_into_forward(path, module)
                except Exception as error:  # whatever a forward raises that is not given tensors
                    reason = str(error).strip().partition("\n")[0] or type(error).__name__
                    failures[path] = f"{Call(path or 'the model', module)} is no graph: {reason}"
        for path, module in model.named_modules():
            if isinstance(module, NORMS) and path not in self.report.done:
                self.report.left.setdefault(path or "the model", _unseen(path, module, failures))
        for path in self.report.done:
            self.report.left.pop(path, None)
        self.report.note = "\n".join(f"left as it is: {reason}" for reason in failures.values())

    def apply(self, model: nn.Module) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of what convert leaves, the report has the reasons
            convert(model)
        for path, rewrites in self.rewrites.items():
            install(model.get_submodule(path), rewrites)

    def _look_into_sequential(self, path: str, module: nn.Module) -> None:
        layers = list(module._modules.values())
        for layer, following in zip_longest(layers, layers[1:]):
            norm = _chain.last_layer(layer)
            if type(norm) not in _chain.FUSED_NORMS:
                continue
            name = self.names[norm]
            call = "the end" if following is None else Call(self.names[following], following)
            if not _chain.is_pair(norm, following):
                self.report.left.setdefault(name, f"before {call}")
            elif not (_chain.is_plain(norm) and _chain.is_plain(following)):
                self.report.left[name] = f"it or {call} has hooks or a forward of its own"
            else:
                self.report.done[name] = f"with {call}"
                self.rewrites[path] = []

    def _look_into_forward(self, path: str, module: nn.Module) -> None:
        if "forward" in vars(module):
            raise TypeError("it has a forward of its own")
        first = Tracer(module, self.lists.get(module, {}))
        traced = [first]
        if any(name == "training" for _, name in first.dependencies.reads):
            traced.append(Tracer(module, first.lists, not module.training))
        for tracer in traced:
            modules = dict(module.named_modules(remove_duplicate=False))
            fusions = Fusions(tracer.graph, modules)
            self._note_lists(tracer.graph, modules)
            own = fusions.apply()
            for name, outcome in own.done.items():
                self.report.done[self._full(path, module, name)] = outcome
            for name, reason in own.left.items():
                self.report.left[self._full(path, module, name)] = reason
            if own.done:
                rewrite = _rewrite(module, tracer, fusions)
                self.rewrites.setdefault(path, []).append(rewrite)

    def _note_lists(self, graph: fx.Graph, modules: dict[str, nn.Module]) -> None:
        """Note which modules are given lists of tensors, for when their forwards are traced."""
        for node in graph.nodes:
            if node.op == "call_module" and not node.kwargs:
                module = modules[node.target]
                names = inspect.signature(module.forward).parameters
                for name, argument in zip(names, node.args, strict=False):
                    if isinstance(argument, list):
                        self.lists.setdefault(module, {})[name] = len(argument)

    def _full(self, path: str, module: nn.Module, name: str) -> str:
        """The path in the model. What the forward of a norm calls has the path of that norm."""
        if isinstance(module, NORMS):
            return path or "the model"
        return f"{path}.{name}" if path else name


def _has_forward_with_norms(module: nn.Module) -> bool:
    kind = type(module)
    known = kind.__module__.startswith(("torch.", "batchnorm_ext."))
    if known or kind.forward is nn.Module.forward:
        return False
    return any(isinstance(layer, NORMS) for layer in module.modules())


def _rewrite(module: nn.Module, tracer: Tracer, fusions: Fusions) -> Rewrite:
    parameters = [
        (p.name, tracer.lists.get(p.name, "tensor") if p.default is p.empty else (p.default,))
        for p in tracer.parameters
    ]
    reads = [(path, name, value) for (path, name), value in tracer.dependencies.reads.items()]
    parents = {"", *tracer.dependencies.parents}
    for path, own in module.named_modules():
        if isinstance(own, (nn.ModuleList, nn.ModuleDict)):
            parents.add(path)
    for node in tracer.graph.nodes:
        if node.op in ("call_module", "get_attr"):
            parents.add(node.target.rpartition(".")[0])
    members = [(path, members_of(module.get_submodule(path))) for path in sorted(parents)]
    return Rewrite.of(tracer.graph, parameters, reads, members, sorted(fusions.passes))


def _unseen(path: str, module: nn.Module, failures: dict[str, str]) -> str:
    if type(module) in _UNFUSED:
        return "has no fused form"
    owner = path
    while True:
        if owner in failures:
            return failures[owner]
        if not owner:
            return "not called by a forward that was looked into"
        owner = owner.rpartition(".")[0]
