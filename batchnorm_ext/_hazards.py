"""Why a norm in a graph cannot be computed together with, and as late as, what follows it."""

from dataclasses import dataclass, field

from torch import fx, nn
from torch.nn.modules.conv import _ConvNd

from batchnorm_ext import _chain
from batchnorm_ext._activations import ACTIVATIONS, activation_name
from batchnorm_ext._graph import NORMS, Call
from batchnorm_ext._spelling import Activation, Norm, norm_of, switches, writes

# The backward of relu reads its output either way; without an activation it reads neither output
# nor residual. That of all others reads the output where `reads_output`, or else the residual.
_AS_NATIVE = ("relu", "")

# functions whose results are memory of their own
_FRESH = {f"conv{extra}{dims}d" for extra in ("", "_transpose") for dims in (1, 2, 3)}
_FRESH |= {"linear", "cat", "matmul"}


@dataclass
class Fusion:
    """Nodes that become one call, which stands in the place of the last of them."""

    norm: Norm
    nodes: list[fx.Node]
    passes: list[fx.Node] = field(default_factory=list)  # those among them that do nothing
    residual: fx.Node | None = None
    sum: fx.Node | None = None
    written: str = ""  # "norm" or "residual", if the sum is written into that
    activation: Activation | None = None

    @property
    def last(self) -> fx.Node:
        return self.nodes[-1]

    def activation_name(self, modules: dict[str, nn.Module]) -> str:
        if self.activation is None:
            return ""
        if self.activation.is_module:
            return activation_name(modules[self.activation.name])
        return self.activation.name.removeprefix("_")


class Hazards:
    """What of a graph a fused call would read at another time than the nodes that it replaces."""

    def __init__(self, graph: fx.Graph, modules: dict[str, nn.Module]) -> None:
        self.nodes, self.modules = list(graph.nodes), modules
        self.order = {node: place for place, node in enumerate(self.nodes)}

    def of(self, fusion: Fusion) -> str:
        return self._before_the_end(fusion) or self._afterwards(fusion)

    def _before_the_end(self, fusion: Fusion) -> str:
        """The norm is computed later than it was: what it needs has to be as it was."""
        state = self._state(fusion.norm)
        for node in self.nodes[self.order[fusion.norm.node] + 1 : self.order[fusion.last]]:
            if node in fusion.nodes or node.op == "get_attr":
                continue
            name = describe(self.modules, node)
            if switches(node):
                return f"{name} comes before the end"
            if state & self._touched(node):
                return f"{name} comes before the sum and uses what the norm uses"
            if writes(node, self.modules):
                if fusion.sum is not None and self.order[node] > self.order[fusion.sum]:
                    return f"{name} comes before the activation and may write"
                if not self.is_private(fusion.norm.input):
                    return f"{name} comes before the sum and may write"
        return ""

    def _afterwards(self, fusion: Fusion) -> str:
        """The backward needs other values than it did: nothing may write to those either."""
        name = fusion.activation_name(self.modules).partition("(")[0]
        if fusion.residual is None or name in _AS_NATIVE:
            return ""
        reads_output = ACTIVATIONS[name].reads_output
        if reads_output and not self._is_in_place(fusion.activation):
            if any(user.op == "output" for user in fusion.last.users):
                return "returned to who may write to it, and needed by the backward of the sum"
        needed = fusion.last if reads_output else fusion.residual
        for user in needed.users:
            if self.order[user] > self.order[fusion.last] and writes(user, self.modules):
                name = describe(self.modules, user)
                return f"{name} may write to what the backward of the sum needs"
        return ""

    def _is_in_place(self, activation: Activation) -> bool:
        """Whether PyTorch's backward, too, reads the output."""
        if activation.is_module:
            return self.modules[activation.name].inplace
        return activation.name.startswith("_")

    def is_private(self, node: fx.Node) -> bool:
        """Whether the value is memory of its own, which one node alone uses."""
        if len(node.users) != 1:
            return False
        if node.op == "call_module":
            module = _chain.last_layer(self.modules[node.target])
            known = type(module).__module__.startswith(("torch.nn.modules.", "batchnorm_ext."))
            return known and isinstance(module, (_ConvNd, nn.Linear, *NORMS))
        if node.op != "call_function":
            return False
        fresh = getattr(node.target, "__name__", "") in _FRESH
        return fresh or norm_of(node, self.modules) is not None

    def _state(self, norm: Norm) -> set[object]:
        """What the norm reads and writes besides its input."""
        if norm.module is not None:
            return _tensors(norm.module)
        arguments = norm.arguments[1:] if norm.operator is None else norm.operator.args[1:]
        return {argument for argument in arguments if isinstance(argument, fx.Node)}

    def _touched(self, node: fx.Node) -> set[object]:
        if node.op == "call_module":
            return _tensors(self.modules[node.target])
        return set(node.all_input_nodes)


def _tensors(module: nn.Module) -> set[object]:
    return {id(tensor) for tensor in (*module.parameters(), *module.buffers())}


def describe(modules: dict[str, nn.Module], node: fx.Node) -> str:
    if node.op == "call_module":
        return str(Call(node.target, modules[node.target]))
    if node.op == "output":
        return "the output"
    return str(getattr(node.target, "__name__", node.target))


def example(node: fx.Node) -> object:
    """The value of a node, where the graph has been made with an example."""
    return node.meta.get("example_value", node.meta.get("val"))
