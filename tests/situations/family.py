"""Instance, group, layer and root mean square normalization: each use for every kind of layer."""

import copy
import io
import pickle
import warnings

import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from situations.harness import attempt, caught, situation
from situations.parts import DTYPES, FLOATS, batch, numbered, state, step

IMAGE = (4, 6, 3, 2)
KINDS = {
    "InstanceNorm1d": (lambda lib, **o: lib.InstanceNorm1d(6, affine=True, **o), (4, 6, 5)),
    "InstanceNorm2d": (lambda lib, **o: lib.InstanceNorm2d(6, affine=True, **o), IMAGE),
    "InstanceNorm2d, tracking": (
        lambda lib, **o: lib.InstanceNorm2d(6, affine=True, track_running_stats=True, **o),
        IMAGE,
    ),
    "InstanceNorm3d": (lambda lib, **o: lib.InstanceNorm3d(6, **o), (2, 6, 2, 3, 2)),
    "GroupNorm": (lambda lib, **o: lib.GroupNorm(2, 6, **o), IMAGE),
    "LayerNorm": (lambda lib, **o: lib.LayerNorm((3, 2), **o), IMAGE),
    "RMSNorm": (lambda lib, **o: lib.RMSNorm((2,), **o), IMAGE),
}
SIZES = [
    (),
    (6,),
    (4, 6),
    (4, 6, 5),
    IMAGE,
    (2, 6, 2, 3, 2),
    (0, 6, 3, 2),
    (4, 6, 1, 1),
    (4, 5, 3, 2),
]
SCALE = 4  # of the terms of gradients: the channels of a batch are up to 4 standard deviations away


def for_each_kind(name: str, **options):
    """Add ``run(lib, make, size)`` once for each kind of layer."""

    def add(run):
        for kind, (make, size) in KINDS.items():

            def of_kind(lib, make=make, size=size):
                return run(lib, lambda **o: numbered(make(lib, **o)), size)

            situation(f"{kind}: {name}", scale=SCALE, **options)(of_kind)

    return add


@for_each_kind("inputs of every size")
def _(lib, make, size):
    return [caught(attempt, make(), batch(*other)) for other in SIZES]


@for_each_kind("inputs of every size in evaluation")
def _(lib, make, size):
    return [caught(attempt, make().eval(), batch(*other)) for other in SIZES]


@for_each_kind("three steps and an evaluation")
def _(lib, make, size):
    layer = make()
    return [step(layer, batch(*size) + i) for i in range(3)], layer.eval()(batch(*size))


@for_each_kind("dtypes of input")
def _(lib, make, size):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # native's, of the mixes that ours takes
        return [caught(lambda d=d: attempt(make(), batch(*size, dtype=d))) for d in DTYPES]


@for_each_kind("dtypes of the layer")
def _(lib, make, size):
    return [caught(lambda d=d: step(make().to(d), batch(*size, dtype=d))) for d in FLOATS]


@for_each_kind("dtypes of input and layer")
def _(lib, make, size):
    def mixed(layer, input):
        return attempt(make().to(layer), batch(*size, dtype=input))

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return {(d, e): caught(mixed, d, e) for d in FLOATS for e in FLOATS if d != e}


@for_each_kind("autocast")
def _(lib, make, size):
    found = []
    for dtype in (torch.float32, torch.bfloat16):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found.append(caught(lambda d=dtype: make().to(d)(batch(*size, dtype=d)).dtype))
    return found


@for_each_kind("what wants a gradient")
def _(lib, make, size):
    found = []
    for wants in ("input", "weight", "bias", "nothing"):
        layer, x = make(), batch(*size)
        for name, parameter in layer.named_parameters():
            parameter.requires_grad_(name == wants)
        x.requires_grad_(wants == "input")
        y = layer(x)
        if y.requires_grad:
            y.square().sum().backward()
        found.append([y, x.grad, [p.grad for p in layer.parameters()]])
    return found


@for_each_kind("second derivative")
def _(lib, make, size):
    layer, x = make(), batch(*size).requires_grad_()
    (dx,) = torch.autograd.grad(layer(x).cos().sum(), x, create_graph=True)
    return torch.autograd.grad(dx.square().sum(), [x, *layer.parameters()], allow_unused=True)


@for_each_kind("no_grad and inference mode")
def _(lib, make, size):
    layer, x = make(), batch(*size)
    with torch.no_grad():
        y = layer(x)
    with torch.inference_mode():
        z = layer(x)
    return y, z


@for_each_kind("views and slices")
def _(lib, make, size):
    x = batch(*size)
    wide = torch.cat([x, x], -1)[..., : size[-1]]
    return [make()(t) for t in (wide, x.flip(0), x.transpose(0, 0), x[:1].expand(size))]


@for_each_kind("eps: numbers")
def _(lib, make, size):
    return [
        caught(lambda e=e: attempt(make(eps=e), batch(*size)))
        for e in (0.0, 1e-12, 1, 1e3, float("inf"))
    ]


@for_each_kind("hooks of the module")
def _(lib, make, size):
    layer, seen = make(), []
    layer.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].shape))
    layer.register_forward_hook(lambda module, inputs, output: output * 2)
    layer.register_full_backward_hook(lambda module, dx, dy: seen.append(dy[0].shape))
    return step(layer, batch(*size)), seen


@for_each_kind("saved tensors: pass through hooks")
def _(lib, make, size):
    with saved_tensors_hooks(lambda t: t.detach().clone(), lambda t: t):
        return step(make(), batch(*size))


@for_each_kind("activation checkpointing")
def _(lib, make, size):
    layer, x = make().eval(), batch(*size).requires_grad_()
    checkpoint(layer, x, use_reentrant=False).square().sum().backward()
    return x.grad, [parameter.grad for parameter in layer.parameters()]


@for_each_kind("copies, pickles and state dicts")
def _(lib, make, size):
    layer, x = make(), batch(*size)
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    fresh = make()
    fresh.load_state_dict(torch.load(file))
    again = [copy.copy(layer), copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), fresh]
    return [other(x) for other in again], state(layer), repr(layer)


@for_each_kind("parameters that are None, replaced, shared and expanded")
def _(lib, make, size):
    found = []
    for change in (
        lambda layer: setattr(layer, "weight", None),
        lambda layer: setattr(layer, "bias", None),
        lambda layer: setattr(layer, "weight", nn.Parameter(layer.weight * 2)),
        lambda layer: setattr(layer, "bias", layer.weight),
        lambda layer: setattr(layer, "weight", nn.Parameter(torch.ones(1).expand(6))),
        lambda layer: setattr(layer, "weight", nn.Parameter(torch.ones(7))),
        lambda layer: setattr(layer, "weight", nn.Parameter(torch.ones(1, 6))),
    ):
        layer = make()
        if getattr(layer, "weight", None) is None:
            continue
        change(layer)
        found.append(caught(attempt, layer, batch(*size)))
    return found


@for_each_kind("torch.func")
def _(lib, make, size):
    layer, x = make().eval(), batch(*size)
    values = dict(layer.named_parameters())

    def loss(values, x):
        return torch.func.functional_call(layer, values, (x,)).square().sum()

    return (
        torch.func.grad(loss)(values, x) if values else None,
        torch.func.grad(loss, argnums=1)(values, x),
        torch.func.vmap(layer)(torch.stack([x, x + 1])),
        torch.func.jvp(layer, (x,), (x.cos(),)),
    )


@for_each_kind("meta and sparse tensors")
def _(lib, make, size):
    found = [caught(lambda: make().to("meta")(batch(*size).to("meta")))]
    return [*found, caught(make(), batch(*size).to_sparse())]


@for_each_kind("a tensor subclass and a torch function mode")
def _(lib, make, size):
    class Sub(torch.Tensor):
        pass

    class Mode(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            names.append(getattr(function, "__name__", "?"))
            return function(*args, **(kwargs or {}))

    names, layer = [], make()
    y = layer(batch(*size).as_subclass(Sub))
    with Mode():
        z = layer(batch(*size))
    return y, z, [name for name in names if name.endswith("_norm")]


@situation("lazy instance norms", of_classes=True)
def _(lib):
    found = []
    for dims in (1, 2, 3):
        layer = getattr(lib, f"LazyInstanceNorm{dims}d")(affine=True)
        found.append((layer(batch(4, 6, *[3] * dims)), repr(layer), state(layer)))
    return found
