"""The graph pass that makes one call of a norm, an addition and an activation."""

from collections.abc import Callable
from operator import getitem

from torch import Tensor, fx, nn
from torch.fx.node import map_arg

from batchnorm_ext import _chain
from batchnorm_ext._activations import can_fuse
from batchnorm_ext._graph import Report
from batchnorm_ext._hazards import Fusion, Hazards, describe, example
from batchnorm_ext._spelling import (
    Addition,
    Norm,
    activation_of,
    addition_of,
    is_pass,
    norm_of,
)

__all__ = ["fuse_graph"]


def fuse_graph(graph_module: fx.GraphModule) -> Report:
    """Make one call of each norm, addition and activation in a graph of torch functions.

    For compiler backends, which get such graphs from ``torch.compile``, and for what
    ``torch.fx.symbolic_trace`` gives. Takes ``norm -> activation``, ``norm -> addition ->
    activation`` and ``norm -> addition``, where the norm is batch, instance or group normalization,
    by a module or a function of ``torch.nn`` or of this library, and each step may be spelled as a
    module, function, method or operator, in place or not. In place; the graph computes what it did
    before. Where a residual turns out to broadcast, and for float64 on CUDA, a fused call takes the
    steps one after the other. Source of what is fused: Ioffe & Szegedy 2015, algorithm 1.

    Args:
        graph_module: a graph before autograd, of tensors of any shape and dtype.

    Returns:
        What has been done, as of :func:`batchnorm_ext.fuse`, by the paths of modules or the names
        of nodes.

    Raises:
        TypeError: not a ``torch.fx.GraphModule``.

    Example::

        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
        >>> graph_module = torch.fx.symbolic_trace(model)
        >>> print(batchnorm_ext.fuse_graph(graph_module))
        fused 1 of 1 layers
          fused 1 with 2 (ReLU)
    """
    if not isinstance(graph_module, fx.GraphModule):
        raise TypeError(f"expected a torch.fx.GraphModule, got {type(graph_module).__qualname__}")
    modules = dict(graph_module.named_modules(remove_duplicate=False))
    report = Fusions(graph_module.graph, modules).apply()
    graph_module.recompile()
    return report


class Fusions:
    """What is fused in a graph, and why the other norms are left."""

    def __init__(self, graph: fx.Graph, modules: dict[str, nn.Module]) -> None:
        self.graph, self.modules, self.report = graph, modules, Report("fused")
        self._use_results_of_writes()
        self._hazards = Hazards(graph, modules)
        order = self._hazards.order
        self.read = {node.target for node in graph.nodes if node.op == "get_attr"}
        self.found: list[Fusion] = []
        left: list[tuple[str, str]] = []
        norms = [norm for node in graph.nodes if (norm := norm_of(node, modules))]
        # of two norms that are added, the one whose memory takes the sum, or else the later one
        norms.sort(key=lambda norm: (self._takes_sum(norm), order[norm.node]), reverse=True)
        for norm in norms:
            fusion = self._fusion(norm)
            if isinstance(fusion, Fusion):
                self.found.append(fusion)
            else:
                left.append((self.name(norm), fusion))
        self.found.sort(key=lambda fusion: order[fusion.last])
        for fusion in self.found:
            outcome, name = self._outcome(fusion), self.name(fusion.norm)
            before = self.report.done.get(name)
            self.report.done[name] = f"{before}; {outcome}" if before else outcome
        for name, reason in sorted(left, key=lambda one: one[0]):
            if name in self.report.done:
                self.report.done[name] += f"; another call left: {reason}"
            else:
                self.report.left[name] = reason

    def apply(self) -> Report:
        new: dict[fx.Node, fx.Node] = {}
        for fusion in self.found:
            new[fusion.last] = self._rewrite(fusion, lambda node: new.get(node, node))
        return self.report

    @property
    def passes(self) -> set[str]:
        """Paths of modules that are no longer called because they do nothing."""
        return {node.target for fusion in self.found for node in fusion.passes}

    def name(self, norm: Norm) -> str:
        path, module = norm.path, self.modules.get(norm.path)
        if not path:
            return norm.node.name
        while module is not norm.module:
            key, module = next(reversed(module._modules.items()))
            path = f"{path}.{key}"
        return path

    def _use_results_of_writes(self) -> None:
        """A write and what it writes to are one tensor: later nodes use the result of the write."""
        for node in self.graph.nodes:
            written = self._written_by(node)
            if written is None:
                continue
            after = set()
            following = node.next
            while following.op != "root":
                after.add(following)
                following = following.next
            for user in [user for user in written.users if user in after]:
                user.replace_input_with(written, node)

    def _written_by(self, node: fx.Node) -> fx.Node | None:
        activation = activation_of(node, self.modules)
        if activation is not None:
            module = self.modules[activation.name] if activation.is_module else None
            if module is None:
                return activation.of if activation.name.startswith("_") else None
            in_place = getattr(module, "inplace", False) and _chain.is_plain(module)
            return activation.of if in_place else None
        addition = addition_of(node)
        # a += b of numbers, which a graph may also hold, does not write
        tensor = node.op == "call_method" or isinstance(example(node), Tensor)
        in_place = isinstance(addition, Addition) and addition.in_place and tensor
        return addition.first if in_place else None

    def _takes_sum(self, norm: Norm) -> bool:
        following = self._following(norm.node, [])
        addition = addition_of(following) if isinstance(following, fx.Node) else None
        in_place = isinstance(addition, Addition) and addition.in_place
        return in_place and addition.first is norm.node

    def _following(self, node: fx.Node, passes: list[fx.Node]) -> fx.Node | str:
        """The one node that uses the value, after those that pass it on; or why there is none."""
        while True:
            users = list(node.users)
            if len(users) != 1:
                names = ", ".join(describe(self.modules, user) for user in users)
                return f"used by {names}" if users else "not used"
            if users[0].op == "output":
                return "returned"
            if not is_pass(users[0], self.modules):
                return users[0]
            node = users[0]
            passes.append(node)

    def _fusion(self, norm: Norm) -> Fusion | str:
        if reason := self._norm_refusal(norm):
            return reason
        passes: list[fx.Node] = []
        following = self._following(norm.node, passes)
        if isinstance(following, str):
            return following
        fusion = Fusion(norm, [norm.node, *passes], passes)
        addition = addition_of(following)
        if isinstance(addition, str):
            return f"before {addition}"
        if addition is not None:
            if reason := self._add(fusion, addition, following):
                return reason
            passes = []
            following = self._following(following, passes)
        activation = None
        if isinstance(following, fx.Node) and not self._hooks(following):
            activation = activation_of(following, self.modules)
        if activation is not None:
            fusion.activation = activation
            fusion.nodes += [*(passes if fusion.sum else []), following]
            fusion.passes += passes if fusion.sum else []
        elif fusion.sum is None:
            return f"before {describe(self.modules, following)}{self._hooks(following)}"
        return self._kernel_refusal(fusion) or self._hazards.of(fusion) or fusion

    def _norm_refusal(self, norm: Norm) -> str:
        if norm.module is not None:
            path = self.name(norm)
            if not _chain.is_plain(norm.module):
                return "has hooks or a forward of its own"
            if any(name.startswith(f"{path}.") for name in self.read):
                return "read by the forward of another module"
        if norm.operator is not None and len(norm.operator.users) != 1:
            return "its statistics are used"
        return ""

    def _kernel_refusal(self, fusion: Fusion) -> str:
        """Asked of operators alone, which cannot fall back to PyTorch when they run."""
        name = fusion.activation_name(self.modules)
        input, residual = example(fusion.norm.input), fusion.residual and example(fusion.residual)
        if fusion.norm.operator is None:
            return ""
        fuses = can_fuse(input, residual, name)
        return "" if fuses else "its operator has no kernels for the activation here"

    def _hooks(self, node: fx.Node) -> str:
        plain = node.op != "call_module" or _chain.is_plain(self.modules[node.target])
        return "" if plain else ", which has hooks"

    def _add(self, fusion: Fusion, addition: Addition, node: fx.Node) -> str:
        """Take the addition into the fusion, or say why not."""
        own = fusion.last
        if any(node is other.sum for other in self.found):
            return "added to another norm, which takes it as its residual"
        is_first = addition.first is own
        fusion.residual = addition.second if is_first else addition.first
        fusion.sum, fusion.nodes = node, [*fusion.nodes, node]
        if addition.in_place:
            fusion.written = "norm" if is_first else "residual"
        if not is_first and addition.in_place and not self._hazards.is_private(fusion.residual):
            return f"added in place to {describe(self.modules, fusion.residual)}"
        ours, other = example(fusion.norm.node), example(fusion.residual)
        if isinstance(ours, Tensor) and isinstance(other, Tensor):
            for what in ("shape", "dtype", "device"):
                if getattr(ours, what) != getattr(other, what):
                    return f"added to a value of another {what}"
        elif fusion.norm.operator is not None:
            return "added to a value of a shape that is not known"
        return ""

    def _outcome(self, fusion: Fusion) -> str:
        steps = []
        if fusion.sum is not None:
            steps.append(f"the addition of {describe(self.modules, fusion.residual)}")
        if fusion.activation is not None:
            steps.append(describe(self.modules, fusion.last))
        return f"with {' and '.join(steps)}"

    def _rewrite(self, fusion: Fusion, now: Callable[[fx.Node], fx.Node]) -> fx.Node:
        """``now(node)`` is what the node has become."""
        norm, last = fusion.norm, fusion.last
        residual = fusion.residual and now(fusion.residual)
        activation: object = fusion.activation_name(self.modules)
        with self.graph.inserting_before(last):
            if norm.operator is not None:
                new = self._with_operator(norm.operator, residual, activation)
            else:
                arguments = norm.arguments
                if norm.module is not None:
                    arguments = (self.graph.get_attr(norm.path), norm.input)
                arguments = map_arg(arguments, now)
                if fusion.activation is None:
                    activation = None
                elif fusion.activation.is_module:
                    activation = self.graph.get_attr(fusion.activation.name)
                else:
                    activation = fusion.activation.name
                arguments = (*arguments, activation, residual, fusion.written)
                new = self.graph.call_function(norm.replacement, arguments)
        new.meta = last.meta.copy()
        last.replace_all_uses_with(new)
        for node in reversed(fusion.nodes):
            self.graph.erase_node(node)
        if norm.operator is not None:
            self.graph.erase_node(norm.operator)
        return new

    def _with_operator(self, call: fx.Node, residual: fx.Node | None, activation: str) -> fx.Node:
        kwargs = dict(call.kwargs)
        names = [argument.name for argument in call.target._schema.arguments]
        kwargs |= dict(zip(names, call.args, strict=False))
        kwargs |= {"residual": residual, "activation": activation}
        new = self.graph.call_function(call.target, (), kwargs)
        new.meta = call.meta.copy()
        return self.graph.call_function(getitem, (new, 0))
