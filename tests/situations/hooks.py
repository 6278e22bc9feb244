"""Hooks of modules, tensors and graph nodes; patched methods; subclasses of the layers."""

import torch
from torch import nn

from situations.harness import attempt, caught, situation
from situations.parts import batch, numbered, state, step, weights_of


@situation("forward pre-hook that changes the input")
def _(lib):
    layer = numbered(lib.BatchNorm2d(3))
    layer.register_forward_pre_hook(lambda m, args: (2 * args[0],))
    return step(layer, batch(4, 3, 2, 2))


@situation("forward pre-hook that raises")
def _(lib):
    layer = numbered(lib.BatchNorm2d(3))

    def hook(module, args):
        raise KeyError("stop")

    layer.register_forward_pre_hook(hook)
    return caught(attempt, layer, batch(4, 3, 2, 2))


@situation("forward hook: what it sees, what it makes of the output")
def _(lib):
    layer, seen = numbered(lib.BatchNorm2d(3)), []

    def hook(module, args, kwargs, output):
        seen.append((len(args), list(kwargs), module is layer, output.detach()))
        return output * 2

    layer.register_forward_hook(hook, with_kwargs=True)
    return step(layer, batch(4, 3, 2, 2)), layer(input=batch(4, 3, 2, 2)), seen


@situation("forward hook that writes into the output")
def _(lib):
    layer = numbered(lib.BatchNorm2d(3))
    layer.register_forward_hook(lambda m, args, output: output.relu_())
    return step(layer, batch(4, 3, 2, 2))


@situation("forward hook with always_call where the forward fails")
def _(lib):
    layer, seen = numbered(lib.BatchNorm2d(3)), []
    layer.register_forward_hook(lambda m, args, output: seen.append(output), always_call=True)
    return caught(attempt, layer, batch(4, 3)), seen


@situation("full backward hook: gradients it sees and replaces")
def _(lib):
    layer, seen = numbered(lib.BatchNorm2d(3)), []

    def hook(module, grad_input, grad_output):
        seen.append((grad_input, grad_output))
        return (grad_input[0] * 2,)

    layer.register_full_backward_hook(hook)
    return step(layer, batch(4, 3, 2, 2)), seen


@situation("full backward hook: input without a gradient")
def _(lib):
    layer, seen = numbered(lib.BatchNorm2d(3)), []
    layer.register_full_backward_hook(lambda m, gi, go: seen.append((gi, go)))
    y = layer(batch(4, 3, 2, 2))
    y.backward(weights_of(y))
    return seen, layer.weight.grad


@situation("full backward pre-hook that changes the gradient")
def _(lib):
    layer, seen = numbered(lib.BatchNorm2d(3)), []

    def hook(module, grad_output):
        seen.append(grad_output)
        return (grad_output[0] * 3,)

    layer.register_full_backward_pre_hook(hook)
    return step(layer, batch(4, 3, 2, 2)), seen


for options in ({}, {"affine": False}, {"bias": False}):

    @situation(f"legacy backward hook, {options or 'affine'}")
    def _(lib, options=options):
        layer, seen = numbered(lib.BatchNorm2d(3, **options)), []
        layer.register_backward_hook(lambda m, gi, go: seen.append((gi, go)))
        return step(layer, batch(4, 3, 2, 2)), seen


@situation("legacy backward hook: input without a gradient, evaluation")
def _(lib):
    layer, seen = numbered(lib.BatchNorm2d(3)).eval(), []
    layer.register_backward_hook(lambda m, gi, go: seen.append((gi, go)))
    y = layer(batch(4, 3, 2, 2))
    y.backward(weights_of(y))
    return seen


@situation("legacy backward hook that replaces the gradients")
def _(lib):
    layer = numbered(lib.BatchNorm2d(3))
    layer.register_backward_hook(lambda m, gi, go: tuple(g * 2 for g in gi))
    return step(layer, batch(4, 3, 2, 2))


@situation("global module hooks")
def _(lib):
    seen = []
    handles = [
        nn.modules.module.register_module_forward_pre_hook(lambda m, a: seen.append("pre")),
        nn.modules.module.register_module_forward_hook(lambda m, a, o: seen.append("forward")),
        nn.modules.module.register_module_full_backward_hook(lambda m, i, o: seen.append("full")),
    ]
    try:
        return step(numbered(lib.BatchNorm2d(3)), batch(4, 3, 2, 2)), seen
    finally:
        for handle in handles:
            handle.remove()


@situation("hooks on the input, the parameters and the output")
def _(lib):
    layer, seen = numbered(lib.BatchNorm2d(3)), []
    x = batch(4, 3, 2, 2).requires_grad_()
    y = layer(x)
    for tensor in (x, layer.weight, layer.bias, y):
        tensor.register_hook(lambda g: seen.append(g.shape) or g * 2)
    layer.bias.register_post_accumulate_grad_hook(lambda p: seen.append(p.grad.clone()))
    y.backward(weights_of(y))
    return x.grad, layer.weight.grad, layer.bias.grad, seen


@situation("hooks on the node of the graph: number and sizes of its gradients")
def _(lib):
    results = []
    for options in ({}, {"affine": False}):
        layer, seen = numbered(lib.BatchNorm2d(3, **options)), []
        y = layer(batch(4, 3, 2, 2).requires_grad_())
        y.grad_fn.register_prehook(lambda go, seen=seen: seen.append(go))
        y.grad_fn.register_hook(lambda gi, go, seen=seen: seen.append((gi, go)))
        y.backward(weights_of(y))
        results.append(seen)
    return results


@situation("next functions of the node of the graph")
def _(lib):
    def edges(y):
        return [(n and type(n).__name__, i) for n, i in y.grad_fn.next_functions]

    layer, x = numbered(lib.BatchNorm2d(3)), batch(4, 3, 2, 2).requires_grad_()
    frozen = numbered(lib.BatchNorm2d(3)).requires_grad_(False)
    return {
        "all": edges(layer(x)),
        "no gradient of the input": edges(layer(x.detach())),
        "of the input alone": edges(frozen(x)),
        "without parameters": edges(lib.BatchNorm2d(3, affine=False)(x)),
        "without a bias": edges(lib.BatchNorm2d(3, bias=False)(x)),
        "after another node": edges(layer(x.sin())),
        "evaluation": edges(layer.eval()(x)),
    }


@situation("node of the graph: metadata, sequence, number of outputs")
def _(lib):
    y = numbered(lib.BatchNorm2d(3))(batch(4, 3, 2, 2).requires_grad_())
    y.grad_fn.metadata["key"] = 1
    return y.output_nr, y.grad_fn.metadata, len(y.grad_fn._input_metadata)


@situation("forward assigned to an instance")
def _(lib):
    layer = numbered(lib.BatchNorm2d(3))
    layer.forward = lambda x: x * 2
    return layer(batch(4, 3, 2, 2)), state(layer)


@situation("forward of an instance wrapped")
def _(lib):
    layer = numbered(lib.BatchNorm2d(3))
    original = layer.forward
    layer.forward = lambda x: original(x) * 2
    return step(layer, batch(4, 3, 2, 2))


@situation("torch.nn.BatchNorm2d.forward patched by assignment")
def _(lib):
    layer = numbered(lib.BatchNorm2d(3))
    nn.BatchNorm2d.forward = lambda self, x: x * 2
    try:
        return layer(batch(4, 3, 2, 2)), state(layer)
    finally:
        del nn.BatchNorm2d.forward


@situation("forward of the common base patched by assignment")
def _(lib):
    layer, base = numbered(lib.BatchNorm2d(3)), nn.modules.batchnorm._BatchNorm
    original = base.forward
    base.forward = lambda self, x: original(self, x) * 2
    try:
        return layer(batch(4, 3, 2, 2)), state(layer)
    finally:
        base.forward = original


@situation("F.batch_norm patched by assignment")
def _(lib):
    layer, original = numbered(lib.BatchNorm2d(3)), nn.functional.batch_norm
    nn.functional.batch_norm = lambda *args, **kwargs: original(*args, **kwargs) * 2
    try:
        return layer(batch(4, 3, 2, 2)), state(layer)
    finally:
        nn.functional.batch_norm = original


@situation("torch.batch_norm patched by assignment")
def _(lib):
    layer, original = numbered(lib.BatchNorm2d(3)), torch.batch_norm
    torch.batch_norm = lambda *args, **kwargs: original(*args, **kwargs) * 2
    try:
        return layer(batch(4, 3, 2, 2)), state(layer)
    finally:
        torch.batch_norm = original


@situation("_check_input_dim patched on an instance")
def _(lib):
    layer = numbered(lib.BatchNorm2d(3))
    layer._check_input_dim = lambda x: None
    return caught(step, layer, batch(4, 3)), caught(step, layer, batch(4, 3, 2, 2, 2))


@situation("subclass with a forward of its own", of_classes=True)
def _(lib):
    class Twice(lib.BatchNorm2d):
        def forward(self, x):
            return super().forward(x) * 2

    return step(numbered(Twice(3)), batch(4, 3, 2, 2))


@situation("subclass with _check_input_dim of its own", of_classes=True)
def _(lib):
    class Any(lib.BatchNorm2d):
        def _check_input_dim(self, input):
            if input.dim() < 2:
                raise ValueError("too few")

    layer = numbered(Any(3))
    return step(layer, batch(4, 3)), step(layer, batch(4, 3, 5)), caught(layer, batch(3))


@situation("subclass with properties in place of parameters", of_classes=True)
def _(lib):
    class Bounded(lib.BatchNorm2d):
        @property
        def gain(self):
            return self.weight.sigmoid()

    layer = numbered(Bounded(3))
    return layer.gain, step(layer, batch(4, 3, 2, 2)), repr(layer)


@situation("subclass of torch.nn's class, left as it is")
def _(lib):
    class Half(nn.BatchNorm2d):
        def forward(self, x):
            return super().forward(x) / 2

    with_own = nn.Sequential(numbered(Half(3)))
    return step(with_own, batch(4, 3, 2, 2))


@situation("metaclass, weak references and hash", of_classes=True)
def _(lib):
    import weakref

    layer = lib.BatchNorm2d(3)
    return type(lib.BatchNorm2d).__name__, weakref.ref(layer)() is layer, hash(layer) == id(layer)


@situation("called through Module.__call__ and through forward")
def _(lib):
    layer = numbered(lib.BatchNorm2d(3))
    return layer.forward(batch(4, 3, 2, 2)), nn.Module.__call__(layer, batch(4, 3, 2, 2))


@situation("forward of torch.nn's class called on the layer")
def _(lib):
    layer = numbered(lib.BatchNorm2d(3))
    return nn.BatchNorm2d.forward(layer, batch(4, 3, 2, 2)), state(layer)
