"""What autograd saves: hooks on it, its precision, anomaly mode, and activation checkpointing."""

import copy
import warnings

import torch
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

from situations.harness import caught, situation
from situations.parts import batch, gradients, numbered, state, step, weights_of


def packed(lib, pack, unpack, training=True):
    layer = numbered(lib.BatchNorm2d(3)).train(training)
    with saved_tensors_hooks(pack, unpack):
        return step(layer, batch(4, 3, 2, 2))


@situation("saved tensors: packed as they are")
def _(lib):
    return [packed(lib, lambda t: t, lambda t: t, training) for training in (True, False)]


@situation("saved tensors: packed to numpy and back")
def _(lib):
    return packed(lib, lambda t: t.detach().numpy().copy(), torch.from_numpy)


@situation("saved tensors: images are packed to half and unpacked as they were")
def _(lib):
    return packed(
        lib, lambda t: t.half() if t.dim() == 4 else t, lambda t: t.float() if t.dim() == 4 else t
    )


@situation("saved tensors: images come back in half precision")
def _(lib):
    return [
        caught(packed, lib, lambda t: t.half() if t.dim() == 4 else t, lambda t: t, training)
        for training in (True, False)
    ]


@situation("saved tensors: everything comes back in double precision")
def _(lib):
    return [
        caught(packed, lib, lambda t: t.double(), lambda t: t, training)
        for training in (True, False)
    ]


@situation("saved tensors: images come back in another memory format", scale=4)
def _(lib):
    def pack(t):
        return t.to(memory_format=torch.channels_last) if t.dim() == 4 else t

    return packed(lib, pack, lambda t: t)


@situation("saved tensors: images come back non-dense")
def _(lib):
    def unpack(t):
        return t.repeat_interleave(2, 0)[::2] if t.dim() == 4 else t

    return packed(lib, lambda t: t, unpack)


@situation("saved tensors: images are quantized in between")
def _(lib):
    def pack(t):
        return torch.quantize_per_tensor(t.detach(), 0.05, 0, torch.qint8) if t.dim() == 4 else t

    return packed(lib, pack, lambda t: t.dequantize() if t.is_quantized else t)


@situation("saved tensors: come back of another size")
def _(lib):
    return caught(packed, lib, lambda t: t, lambda t: t[:2] if t.dim() == 4 else t)


@situation("saved tensors: come back as something else")
def _(lib):
    return caught(packed, lib, lambda t: t, lambda t: None), caught(
        packed, lib, lambda t: t, lambda t: 1.0
    )


@situation("saved tensors: a hook that raises")
def _(lib):
    def fail(t):
        raise KeyError("stop")

    return caught(packed, lib, fail, lambda t: t), caught(packed, lib, lambda t: t, fail)


@situation("saved tensors: a pack hook that writes to its input")
def _(lib):
    return caught(packed, lib, lambda t: t.detach().mul_(1), lambda t: t)


@situation("saved tensors: images among them, by identity and number")
def _(lib):
    seen = []

    def pack(t):
        seen.append(t)
        return t

    layer, x = numbered(lib.BatchNorm2d(3)), batch(4, 3, 2, 2).requires_grad_()
    with saved_tensors_hooks(pack, lambda t: t):
        layer(x)
    images = [t for t in seen if t.dim() == 4]
    return (
        len(images),
        images[0].data_ptr() == x.data_ptr(),
        any(t.data_ptr() == layer.weight.data_ptr() for t in seen),
    )


@situation("saved tensors: none without gradients")
def _(lib):
    seen = []
    with saved_tensors_hooks(lambda t: seen.append(t) or t, lambda t: t), torch.no_grad():
        numbered(lib.BatchNorm2d(3))(batch(4, 3, 2, 2))
    return len(seen)


@situation("saved tensors: disabled with a message")
def _(lib):
    with torch.autograd.graph.disable_saved_tensors_hooks("not here"):
        return step(numbered(lib.BatchNorm2d(3)), batch(4, 3, 2, 2))


@situation("save_on_cpu")
def _(lib):
    with save_on_cpu():
        return step(numbered(lib.BatchNorm2d(3)), batch(4, 3, 2, 2))


@situation("allow_mutation_on_saved_tensors")
def _(lib):
    layer, x = numbered(lib.BatchNorm2d(3)), batch(4, 3, 2, 2).requires_grad_().clone()
    x.retain_grad()
    with torch.autograd.graph.allow_mutation_on_saved_tensors():
        y = layer(x)
        with torch.no_grad():
            x.mul_(2)
            layer.weight.mul_(2)
        y.backward(weights_of(y))
    return x.grad, gradients(layer)


@situation("anomaly mode: a NaN in the backward")
def _(lib):
    def run(check_nan):
        layer, x = numbered(lib.BatchNorm2d(3)), batch(4, 3, 2, 2).requires_grad_()
        with torch.autograd.detect_anomaly(check_nan=check_nan):
            y = layer(x)
            y.backward(weights_of(y) * torch.tensor(float("nan")))
        return x.grad

    with warnings.catch_warnings(record=True) as given:
        stopped = caught(run, True)
    # the texts hold the name of the node and the lines that lead to it
    return type(stopped).__name__, len(given), caught(run, False)


@situation("anomaly mode: an ordinary step")
def _(lib):
    with torch.autograd.set_detect_anomaly(True):
        return step(numbered(lib.BatchNorm2d(3)), batch(4, 3, 2, 2))


for reentrant in (True, False):
    what = "reentrant" if reentrant else "not reentrant"

    @situation(f"checkpoint, {what}: result and gradients")
    def _(lib, reentrant=reentrant):
        layer = numbered(lib.BatchNorm2d(3))
        x = batch(4, 3, 2, 2).requires_grad_()
        y = checkpoint(layer, x, use_reentrant=reentrant)
        y.backward(weights_of(y))
        return {"y": y, "dx": x.grad, "gradients": gradients(layer), "state": state(layer)}

    @situation(f"checkpoint, {what}: evaluation")
    def _(lib, reentrant=reentrant):
        layer = numbered(lib.BatchNorm2d(3)).eval()
        x = batch(4, 3, 2, 2).requires_grad_()
        y = checkpoint(layer, x, use_reentrant=reentrant)
        y.backward(weights_of(y))
        return {"y": y, "dx": x.grad, "gradients": gradients(layer), "state": state(layer)}

    @situation(f"checkpoint, {what}: input without a gradient")
    def _(lib, reentrant=reentrant):
        layer = numbered(lib.BatchNorm2d(3))
        y = checkpoint(layer, batch(4, 3, 2, 2), use_reentrant=reentrant)
        return y.requires_grad


@situation("checkpoint_sequential with a frozen layer")
def _(lib):
    model = torch.nn.Sequential(*(numbered(lib.BatchNorm2d(3)).eval() for _ in range(4)))
    x = batch(4, 3, 2, 2).requires_grad_()
    y = checkpoint_sequential(model, 2, x, use_reentrant=False)
    y.backward(weights_of(y))
    return y, x.grad, gradients(model)


@situation("set_checkpoint_early_stop off")
def _(lib):
    layer, x = numbered(lib.BatchNorm2d(3)).eval(), batch(4, 3, 2, 2).requires_grad_()
    with torch.utils.checkpoint.set_checkpoint_early_stop(False):
        y = checkpoint(layer, x, use_reentrant=False)
        y.backward(weights_of(y))
    return x.grad, gradients(layer)


@situation("checkpoint with determinism check and debug")
def _(lib):
    layer, x = numbered(lib.BatchNorm2d(3)).eval(), batch(4, 3, 2, 2).requires_grad_()
    y = checkpoint(layer, x, use_reentrant=False, determinism_check="default")
    y.backward(weights_of(y))
    return x.grad


@situation("deterministic algorithms")
def _(lib):
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        return step(numbered(lib.BatchNorm2d(3)), batch(4, 3, 2, 2))
    finally:
        torch.use_deterministic_algorithms(before)


@situation("deepcopy of an output that is no leaf")
def _(lib):
    return caught(copy.deepcopy, numbered(lib.BatchNorm2d(3))(batch(4, 3, 2, 2)))
