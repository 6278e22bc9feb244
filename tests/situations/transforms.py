"""torch.func, forward-mode differentiation, batched gradients."""

import torch
import torch._decomp.decompositions_for_jvp  # warns once, when it is first needed
import torch.autograd.forward_ad as forward_ad
from torch import func, nn

from situations.harness import caught, situation
from situations.parts import batch, numbered, state, step, weights_of


@situation("func.functional_call with parameters and buffers")
def _(lib):
    layer = numbered(lib.BatchNorm2d(3))
    given = {n: v.clone() for n, v in layer.state_dict().items()}
    given["weight"] = given["weight"].requires_grad_()
    y = func.functional_call(layer, given, batch(4, 3, 2, 2))
    y.backward(weights_of(y))
    return y, given, state(layer), layer.weight.grad


@situation("func.grad of input and parameters in evaluation")
def _(lib):
    layer = numbered(lib.BatchNorm2d(3)).eval()

    def loss(parameters, x):
        return func.functional_call(layer, parameters, x).pow(2).sum()

    return func.grad(loss, (0, 1))(dict(layer.named_parameters()), batch(4, 3, 2, 2))


@situation("func.grad in training: buffers that cannot be written to")
def _(lib):
    layer = numbered(lib.BatchNorm2d(3))
    return caught(func.grad(lambda x: layer(x).pow(2).sum()), batch(4, 3, 2, 2))


@situation("func.grad in training without running statistics")
def _(lib):
    layer = numbered(lib.BatchNorm2d(3, track_running_stats=False))
    return func.grad(lambda x: layer(x).pow(2).sum())(batch(4, 3, 2, 2))


@situation("func.vmap in evaluation, over inputs and over stacked layers")
def _(lib):
    layers = [numbered(lib.BatchNorm2d(3)).eval() for _ in range(2)]
    x = torch.stack([batch(4, 3, 2, 2), 2 * batch(4, 3, 2, 2)])
    parameters, buffers = func.stack_module_state(layers)

    def call(parameters, buffers, x):
        return func.functional_call(layers[0], (parameters, buffers), (x,))

    return func.vmap(layers[0])(x), func.vmap(call)(parameters, buffers, x)


@situation("func.vmap in training: over inputs, over stacked layers")
def _(lib):
    layers = [numbered(lib.BatchNorm2d(3)) for _ in range(2)]
    x = torch.stack([batch(4, 3, 2, 2), 2 * batch(4, 3, 2, 2)])
    parameters, buffers = func.stack_module_state(layers)

    def call(parameters, buffers, x):
        return func.functional_call(layers[0], (parameters, buffers), (x,))

    return caught(func.vmap(layers[0]), x), caught(func.vmap(call), parameters, buffers, x), buffers


@situation("func.vmap with chunks, in_dims and randomness")
def _(lib):
    layer = numbered(lib.BatchNorm2d(3)).eval()
    x = torch.stack([batch(4, 3, 2, 2), 2 * batch(4, 3, 2, 2)], 2)
    return func.vmap(layer, in_dims=2, out_dims=1, chunk_size=1, randomness="different")(x)


@situation("func.jvp, vjp, jacrev, jacfwd, hessian in evaluation", scale=64)
def _(lib):
    layer, x = numbered(lib.BatchNorm1d(3)).eval(), batch(2, 3)
    y, pull = func.vjp(layer, x)
    return [
        func.jvp(layer, (x,), (x.cos(),)),
        pull(weights_of(y)),
        func.jacrev(layer)(x),
        func.jacfwd(layer)(x),
        func.hessian(lambda x: layer(x).pow(3).sum())(x),
    ]


@situation("func.replace_all_batch_norm_modules_")
def _(lib):
    model = nn.Sequential(numbered(lib.BatchNorm2d(3)), nn.Sequential(lib.BatchNorm2d(3)))
    func.replace_all_batch_norm_modules_(model)
    buffers = [model[0].running_mean, model[0].num_batches_tracked, model[0].track_running_stats]
    return buffers, func.grad(lambda x: model(x).pow(2).sum())(batch(4, 3, 2, 2))


@situation("forward mode: tangents of input and parameters")
def _(lib):
    def run(training):
        layer = numbered(lib.BatchNorm2d(3)).train(training)
        with forward_ad.dual_level():
            dual = {
                n: forward_ad.make_dual(p.detach(), p.detach().cos())
                for n, p in layer.named_parameters()
            }
            x = forward_ad.make_dual(batch(4, 3, 2, 2), batch(4, 3, 2, 2).cos())
            y = forward_ad.unpack_dual(func.functional_call(layer, dual, x))
            return y.primal, y.tangent

    return caught(run, True), caught(run, False)


@situation("forward mode: a plain input within a level")
def _(lib):
    with forward_ad.dual_level():
        return step(numbered(lib.BatchNorm2d(3)), batch(4, 3, 2, 2))


@situation("batched gradients: is_grads_batched")
def _(lib):
    layer, x = numbered(lib.BatchNorm2d(3)), batch(4, 3, 2, 2).requires_grad_()
    y = layer(x)
    dys = torch.stack([weights_of(y), 2 * weights_of(y)])
    return torch.autograd.grad(y, [x, layer.weight, layer.bias], dys, is_grads_batched=True)


@situation("autograd.functional: jacobian, hessian, vectorized too", scale=64)
def _(lib):
    layer, x = numbered(lib.BatchNorm1d(3)), batch(3, 3)
    jacobian, hessian = torch.autograd.functional.jacobian, torch.autograd.functional.hessian
    return [
        jacobian(layer, x),
        caught(jacobian, layer, x, False, True, True),
        hessian(lambda x: layer(x).pow(3).sum(), x),
    ]


@situation("func.functionalize of a training step")
def _(lib):
    layer = numbered(lib.BatchNorm2d(3))
    return func.functionalize(layer)(batch(4, 3, 2, 2)), state(layer)
