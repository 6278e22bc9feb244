"""Tools that take a layer or a model apart: tracers, exporters, fusion, replication, precision."""

import torch
from torch import fx, nn

from situations.harness import caught, situation
from situations.parts import batch, numbered, state, statistics, step


def model_of(lib, **options):
    """A small model around a layer."""
    layer = numbered(lib.BatchNorm2d(4, **options))
    return nn.Sequential(nn.Conv2d(3, 4, 1), layer, nn.ReLU(), nn.Flatten(), nn.Linear(16, 2))


def nodes(graph):
    """Operations, targets, numbers of arguments and of users."""
    return [
        (n.op, _name(n.target), len(n.args), sorted(n.kwargs), len(n.users)) for n in graph.nodes
    ]


def _name(target):
    if callable(target) and not isinstance(target, torch._ops.OpOverload):
        return f"{target.__module__}.{target.__name__}"
    return str(target)


def jit_nodes(graph):
    return [(n.kind(), [len(o.uses()) for o in n.outputs()]) for n in graph.nodes()]


@situation("fx: a model, its graph, its code, its result")
def _(lib):
    traced = fx.symbolic_trace(model_of(lib))
    return nodes(traced.graph), traced.code, traced(batch(4, 3, 2, 2)), state(traced)


@situation("fx: a layer by itself")
def _(lib):
    return caught(fx.symbolic_trace, lib.BatchNorm2d(3))


@situation("fx: the layer is no leaf")
def _(lib):
    class Deep(fx.Tracer):
        def is_leaf_module(self, m, path):
            return False

    return caught(lambda: nodes(Deep().trace(model_of(lib))))


@situation("fx: the layer is a leaf to a tracer of one's own, by its class")
def _(lib):
    class Norms(fx.Tracer):
        def is_leaf_module(self, m, path):
            return isinstance(m, nn.BatchNorm2d)

    return nodes(Norms().trace(nn.Sequential(lib.BatchNorm2d(3), lib.BatchNorm2d(3))))


@situation("fx: a function that calls batch_norm")
def _(lib):
    def run(x):
        return lib.batch_norm(x, None, None, training=True, eps=1e-3) * 2

    return caught(lambda: nodes(fx.symbolic_trace(run).graph))


@situation("fx: batch_norm of parameters that are traced")
def _(lib):
    def run(x, mean, var):
        return lib.batch_norm(torch.ones(4, 3), mean, var)

    return caught(lambda: nodes(fx.symbolic_trace(run).graph))


@situation("fx: interpreter, shape propagation, retargeting")
def _(lib):
    from torch.fx.passes.shape_prop import ShapeProp

    traced = fx.symbolic_trace(model_of(lib).eval())
    ShapeProp(traced).propagate(batch(4, 3, 2, 2))
    shapes = [tuple(n.meta["tensor_meta"].shape) for n in traced.graph.nodes]
    return shapes, fx.Interpreter(traced).run(batch(4, 3, 2, 2))


@situation("make_fx of evaluation and of a training step")
def _(lib):
    from torch.fx.experimental.proxy_tensor import make_fx

    def names(layer):
        traced = make_fx(layer)(batch(4, 3, 2, 2))
        return traced(batch(4, 3, 2, 2))

    return names(numbered(lib.BatchNorm2d(3)).eval()), caught(names, numbered(lib.BatchNorm2d(3)))


for strict in (True, False):
    for training in (True, False):

        @situation(f"export: strict {strict}, training {training}")
        def _(lib, strict=strict, training=training):
            model = model_of(lib).train(training)
            program = torch.export.export(model, (batch(4, 3, 2, 2),), strict=strict)
            signature = program.graph_signature
            result = program.module()(2 * batch(4, 3, 2, 2))
            return nodes(program.graph), str(signature), result, state(model)


@situation("export: a layer with momentum None")
def _(lib):
    layer = numbered(lib.BatchNorm2d(3, momentum=None))
    return caught(
        lambda: nodes(torch.export.export(layer, (batch(4, 3, 2, 2),), strict=False).graph)
    )


@situation("export: decomposed")
def _(lib):
    program = torch.export.export(model_of(lib).eval(), (batch(4, 3, 2, 2),), strict=False)
    return nodes(program.run_decompositions().graph)


@situation("export: dynamic batch")
def _(lib):
    dynamic = {0: torch.export.Dim.DYNAMIC}
    model = model_of(lib).eval()
    program = torch.export.export(
        model, (batch(4, 3, 2, 2),), dynamic_shapes=(dynamic,), strict=False
    )
    return nodes(program.graph), program.module()(batch(9, 3, 2, 2))


@situation("export: a module that calls batch_norm")
def _(lib):
    class Module(nn.Module):
        def forward(self, x):
            return lib.batch_norm(x, *statistics(), training=False)

    program = torch.export.export(Module(), (batch(4, 3, 2, 2),), strict=False)
    return nodes(program.graph)


@situation("jit.trace: a model in evaluation, graph and code")
def _(lib):
    traced = torch.jit.trace(model_of(lib).eval(), batch(4, 3, 2, 2))
    return jit_nodes(traced.inlined_graph), traced.code, traced(batch(9, 3, 2, 2)), state(traced)


@situation("jit.trace: a layer in training")
def _(lib):
    layer = numbered(lib.BatchNorm2d(3))
    traced = torch.jit.trace(layer, batch(4, 3, 2, 2))
    return jit_nodes(traced.inlined_graph), traced(2 * batch(4, 3, 2, 2)), state(layer)


@situation("jit.trace: a function that calls batch_norm")
def _(lib):
    def run(x):
        return lib.batch_norm(x, *statistics(), training=False)

    return jit_nodes(torch.jit.trace(run, batch(4, 3)).graph)


@situation("jit.script: a layer, its graph and its training")
def _(lib):
    layer = numbered(lib.BatchNorm2d(3))
    scripted = torch.jit.script(layer)
    return jit_nodes(scripted.inlined_graph), step(scripted, batch(4, 3, 2, 2)), state(layer)


@situation("jit.script: a model in evaluation, momentum None in training")
def _(lib):
    scripted = torch.jit.script(model_of(lib).eval())
    layer = numbered(lib.BatchNorm2d(3, momentum=None))
    return scripted(batch(4, 3, 2, 2)), step(torch.jit.script(layer), batch(4, 3, 2, 2))


@situation("jit.script: original_name, frozen and optimized for inference")
def _(lib):
    scripted = torch.jit.script(model_of(lib).eval())
    names = [child.original_name for child in scripted.children()]
    frozen = torch.jit.optimize_for_inference(torch.jit.freeze(scripted))
    return names, frozen(batch(4, 3, 2, 2))


@situation("jit.script: a function that calls batch_norm")
def _(lib):
    batch_norm = lib.batch_norm

    def run(x: torch.Tensor):
        return batch_norm(x, None, None, None, None, True)

    return jit_nodes(torch.jit.script(run).inlined_graph)


@situation("fusion of a convolution and a layer in evaluation")
def _(lib):
    from torch.nn.utils.fusion import fuse_conv_bn_eval, fuse_linear_bn_eval

    convolution, layer = nn.Conv2d(3, 4, 1).eval(), numbered(lib.BatchNorm2d(4)).eval()
    linear, flat = nn.Linear(3, 4).eval(), numbered(lib.BatchNorm1d(4)).eval()
    return [
        fuse_conv_bn_eval(convolution, layer)(batch(4, 3, 2, 2)),
        fuse_linear_bn_eval(linear, flat)(batch(4, 3)),
    ]


@situation("fx.experimental.optimization.fuse")
def _(lib):
    from torch.fx.experimental.optimization import fuse

    fused = fuse(model_of(lib).eval())
    return [type(m).__name__ for m in fused.children()], fused(batch(4, 3, 2, 2))


@situation("ao.quantization.fuse_modules, in evaluation and for training")
def _(lib):
    from torch.ao.quantization import fuse_modules, fuse_modules_qat

    fused = fuse_modules(model_of(lib).eval(), [["0", "1", "2"]])
    trained = fuse_modules_qat(model_of(lib).train(), [["0", "1", "2"]])
    return repr(fused), fused(batch(4, 3, 2, 2)), type(trained[0]).__name__


@situation("DataParallel: a replica with plain tensors for parameters")
def _(lib):
    layer = numbered(lib.BatchNorm2d(3))
    replica = layer._replicate_for_data_parallel()
    for name, parameter in layer.named_parameters():
        setattr(replica, name, parameter * 1)
    for name, buffer in layer.named_buffers():
        replica._buffers[name] = buffer.clone()
    x = batch(4, 3, 2, 2).requires_grad_()
    replica(x).pow(2).sum().backward()
    return type(replica).__name__, x.grad, layer.weight.grad, replica.running_mean, state(layer)


@situation("DataParallel on the CPU")
def _(lib):
    return step(nn.DataParallel(numbered(lib.BatchNorm2d(3))), batch(4, 3, 2, 2))


@situation("torch.profiler sees a batch norm")
def _(lib):
    layer = numbered(lib.BatchNorm2d(3))
    with torch.profiler.profile() as profile:
        layer(batch(4, 3, 2, 2))
    return any("batch_norm" in event.name for event in profile.events())


@situation("swap_module_params_on_conversion")
def _(lib):
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        layer = numbered(lib.BatchNorm2d(3))
        weight = layer.weight
        layer.double()
        return layer.weight is weight, step(layer, batch(4, 3, 2, 2).double())
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)


@situation("skip_init", of_classes=True)
def _(lib):
    layer = numbered(nn.utils.skip_init(lib.BatchNorm2d, 3))
    layer.num_batches_tracked.zero_()
    return step(layer, batch(4, 3, 2, 2)), state(layer)


@situation("clip_grad_norm_")
def _(lib):
    layer = numbered(lib.BatchNorm2d(3))
    step(layer, batch(4, 3, 2, 2))
    return nn.utils.clip_grad_norm_(layer.parameters(), 1.0), layer.weight.grad
