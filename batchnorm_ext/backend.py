"""``torch.compile(model, backend="batchnorm_ext")``."""

from collections.abc import Callable

import torch
from torch import Tensor, fx
from torch._dynamo.backends.registry import lookup_backend, register_backend

from batchnorm_ext._library import logger
from batchnorm_ext.fusion import fuse_graph

__all__ = ["backend"]


@register_backend(name="batchnorm_ext")
def backend(
    graph_module: fx.GraphModule,
    example_inputs: list[Tensor],
    *,
    mode: str | None = None,
    options: dict[str, object] | None = None,
) -> Callable:
    """Fuse norms with additions and activations, then compile with inductor or another backend.

    What ``torch.compile(model, backend="batchnorm_ext")`` calls for each graph. The model may have
    the layers of ``torch.nn`` or of this library. :func:`fuse_graph` runs before autograd sees the
    graph, so that the fused operators decide what is kept for the backward. Norms that nothing
    follows stay what they are.

    Args:
        graph_module: of torch functions, as ``torch.compile`` makes it.
        example_inputs: of the graph.
        mode: as of ``torch.compile``.
        options: ``{"backend": "aot_eager"}`` names the backend that goes on, by default inductor;
            all others are handed to it.

    Returns:
        The compiled function.

    Raises:
        torch._dynamo.exc.InvalidBackend: the option names no backend. Like any error of a backend,
            ``torch.compile`` wraps it into a ``BackendCompilerFailed``.

    Example::

        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
        >>> compiled = torch.compile(model, backend="batchnorm_ext",
        ...                          options={"backend": "aot_eager"})
        >>> compiled(torch.randn(2, 3, 8, 8)).shape
        torch.Size([2, 8, 6, 6])
    """
    options = dict(options or {})
    name = options.pop("backend", "inductor")
    logger.debug("%s", fuse_graph(graph_module))
    if name == "inductor":
        compiler = torch._TorchCompileInductorWrapper(mode, options or None, None)
        return compiler(graph_module, example_inputs)
    arguments = {"mode": mode} if mode else {}
    if options:
        arguments["options"] = options
    return lookup_backend(name)(graph_module, example_inputs, **arguments)
