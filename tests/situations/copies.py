"""State dicts, copies, files, and what a layer says about itself."""

import copy
import io
import pickle

import torch
from torch import nn

from situations.harness import caught, situation
from situations.parts import batch, numbered, state, step

KINDS = ["BatchNorm1d", "BatchNorm2d", "BatchNorm3d"]


def used(lib):
    layer = numbered(lib.BatchNorm2d(3))
    layer(batch(4, 3, 2, 2))
    return layer


@situation("repr and str, alone and in a model")
def _(lib):
    layers = [getattr(lib, kind)(3, eps=1e-3) for kind in KINDS]
    return [repr(nn.Sequential(*layers)), str(layers[0]), layers[1].extra_repr()]


@situation("repr without a bias, momentum None, eval")
def _(lib):
    layer = lib.BatchNorm2d(3, momentum=None)
    del layer.bias
    return caught(repr, layer), repr(lib.BatchNorm2d(3, momentum=None, affine=False).eval())


@situation("names of the class")
def _(lib):
    return [
        (type(layer).__name__, type(layer).__qualname__, layer._get_name())
        for layer in (getattr(lib, kind)(3) for kind in KINDS)
    ]


@situation("__constants__, _version and annotations")
def _(lib):
    layer = lib.BatchNorm2d(3)
    return layer.__constants__, layer._version


@situation("isinstance of torch.nn's classes")
def _(lib):
    bases = (nn.BatchNorm2d, nn.modules.batchnorm._BatchNorm, nn.modules.batchnorm._NormBase)
    return [isinstance(lib.BatchNorm2d(3), base) for base in (*bases, nn.BatchNorm1d, nn.Module)]


@situation("__dict__ of a new layer")
def _(lib):
    return {k: v for k, v in vars(lib.BatchNorm2d(3)).items() if not isinstance(v, dict)}


@situation("dir() and public attributes")
def _(lib):
    return [name for name in dir(lib.BatchNorm2d(3)) if not name.startswith("_")]


@situation("attributes that do not exist")
def _(lib):
    layer = lib.BatchNorm2d(3)
    return (
        caught(lambda: layer.gamma),
        caught(layer.get_parameter, "gamma"),
        hasattr(layer, "gamma"),
    )


@situation("parameters, buffers, modules by name")
def _(lib):
    layer = numbered(lib.BatchNorm2d(3))
    return dict(layer.named_parameters()), dict(layer.named_buffers()), len(list(layer.modules()))


@situation("state_dict: keys, metadata, prefix, keep_vars")
def _(lib):
    layer = used(lib)
    saved = layer.state_dict(prefix="norm.", keep_vars=True)
    return saved, dict(saved._metadata), layer.state_dict()


@situation("state_dict: of native loaded by the library, and back")
def _(lib):
    native, layer = numbered(nn.BatchNorm2d(3)), lib.BatchNorm2d(3)
    loaded = layer.load_state_dict(native.state_dict())
    back = nn.BatchNorm2d(3).load_state_dict(layer.state_dict())
    return str(loaded), str(back), state(layer)


@situation("load_state_dict: missing and unexpected keys")
def _(lib):
    def run(strict, drop, add):
        layer = lib.BatchNorm2d(3)
        given = layer.state_dict()
        for name in drop:
            del given[name]
        given.update({name: torch.ones(3) for name in add})
        return str(layer.load_state_dict(given, strict=strict))

    return [
        caught(run, strict, drop, add)
        for strict in (True, False)
        for drop in ([], ["num_batches_tracked"], ["weight"], ["running_mean", "bias"])
        for add in ([], ["gamma"])
    ]


@situation("load_state_dict: wrong sizes")
def _(lib):
    def run(strict, name, size):
        layer = lib.BatchNorm2d(3)
        return layer.load_state_dict(layer.state_dict() | {name: torch.ones(size)}, strict=strict)

    return [
        caught(run, strict, name, size)
        for strict in (True, False)
        for name, size in [("weight", 4), ("running_var", (1, 3)), ("num_batches_tracked", 1)]
    ]


@situation("load_state_dict: of other dtypes")
def _(lib):
    layer = lib.BatchNorm2d(3)
    layer.load_state_dict({n: v.double() for n, v in layer.state_dict().items()})
    half = lib.BatchNorm2d(3).half()
    half.load_state_dict(numbered(lib.BatchNorm2d(3)).state_dict())
    return state(layer), state(half), step(layer, batch(4, 3, 2, 2))


@situation("load_state_dict: assign=True with tensors of other dtypes")
def _(lib):
    layer = lib.BatchNorm2d(3)
    given = {n: v.double() for n, v in numbered(lib.BatchNorm2d(3)).state_dict().items()}
    result = str(layer.load_state_dict(given, assign=True))
    return result, state(layer), caught(step, layer, batch(4, 3, 2, 2).double())


@situation("load_state_dict: assign=True onto a layer on meta")
def _(lib):
    layer = lib.BatchNorm2d(3, device="meta")
    layer.load_state_dict(numbered(lib.BatchNorm2d(3)).state_dict(), assign=True)
    return step(layer, batch(4, 3, 2, 2))


@situation("load_state_dict: of a version without a counter")
def _(lib):
    def run(version, metadata):
        layer = used(lib)
        old = copy.copy(numbered(nn.BatchNorm2d(3)).state_dict())
        del old["num_batches_tracked"]
        if metadata:
            old._metadata[""] = {} if version is None else {"version": version}
        else:
            del old._metadata
        return str(layer.load_state_dict(old)), state(layer)

    return [caught(run, v, m) for v, m in [(1, True), (None, True), (None, False), (2, True)]]


@situation("load_state_dict: without a counter onto a layer on meta")
def _(lib):
    layer = lib.BatchNorm2d(3, device="meta")
    old = dict(nn.BatchNorm2d(3).state_dict())
    del old["num_batches_tracked"]
    layer.load_state_dict(old, assign=True)
    return state(layer)


@situation("load_state_dict: averaged states, whose counter is a float")
def _(lib):
    states = [used(lib).state_dict(), numbered(lib.BatchNorm2d(3)).state_dict()]
    average = {name: (states[0][name] + states[1][name]) / 2 for name in states[0]}
    layer, assigned = lib.BatchNorm2d(3), lib.BatchNorm2d(3)
    layer.load_state_dict(average)
    assigned.load_state_dict(average, assign=True)
    return step(layer, batch(4, 3, 2, 2)), caught(step, assigned, batch(4, 3, 2, 2))


@situation("federated mean written into the buffers")
def _(lib):
    layer, other = used(lib), numbered(lib.BatchNorm2d(3))
    for name, buffer in layer.named_buffers():
        owner = torch.stack([buffer.float(), other.get_buffer(name).float()]).mean(0)
        setattr(layer, name, owner)
    return layer.num_batches_tracked, step(layer, batch(4, 3, 2, 2))


@situation("torch.optim.swa_utils: averaged model and update_bn")
def _(lib):
    model = nn.Sequential(numbered(lib.BatchNorm2d(3)))
    averaged = torch.optim.swa_utils.AveragedModel(model, use_buffers=True)
    model(batch(4, 3, 2, 2))
    averaged.update_parameters(model)
    averaged.update_parameters(model)
    torch.optim.swa_utils.update_bn([batch(4, 3, 2, 2), 2 * batch(4, 3, 2, 2)], averaged)
    return state(averaged), averaged.module[0].momentum


@situation("deepcopy and copy of a used layer")
def _(lib):
    layer = used(lib)
    deep, shallow = copy.deepcopy(layer), copy.copy(layer)
    return [
        type(deep) is type(layer),
        deep.weight is layer.weight,
        shallow.weight is layer.weight,
        step(deep, batch(4, 3, 2, 2)),
        state(layer),
    ]


@situation("deepcopy of a layer that holds gradients")
def _(lib):
    layer = lib.BatchNorm2d(3)
    step(layer, batch(4, 3, 2, 2))
    return copy.deepcopy(layer).weight.grad, copy.deepcopy(layer).weight.grad_fn


@situation("pickle of a used layer")
def _(lib):
    layer = pickle.loads(pickle.dumps(used(lib)))
    return type(layer).__name__, step(layer, batch(4, 3, 2, 2))


@situation("torch.save and torch.load of a state dict and of a layer")
def _(lib):
    layer, file = used(lib), io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    loaded = torch.load(file, weights_only=True)
    other = io.BytesIO()
    torch.save(layer, other)
    other.seek(0)
    return (
        loaded,
        dict(loaded._metadata),
        step(torch.load(other, weights_only=False), batch(4, 3, 2, 2)),
    )


@situation("state of a layer from before bias and weight could be missing")
def _(lib):
    layer = used(lib)
    old = layer.__getstate__() if hasattr(layer, "__getstate__") else vars(layer)
    old = {k: v for k, v in old.items() if not k.startswith("_non_persistent")}
    revived = type(layer).__new__(type(layer))
    revived.__setstate__(old)
    return caught(revived, batch(4, 3, 2, 2))


@situation("share_memory")
def _(lib):
    layer = numbered(lib.BatchNorm2d(3)).share_memory()
    return layer.running_mean.is_shared(), step(layer, batch(4, 3, 2, 2))


@situation("apply, requires_grad_, zero_grad, reset_parameters, reset_running_stats")
def _(lib):
    layer = used(lib)
    seen = []
    layer.apply(lambda m: seen.append(type(m).__name__)).requires_grad_(False)
    frozen = step(layer, batch(4, 3, 2, 2))
    layer.requires_grad_(True).reset_running_stats()
    after = state(layer)
    layer.reset_parameters()
    return seen, frozen, after, state(layer)


@situation("state dict hooks")
def _(lib):
    layer, seen = lib.BatchNorm2d(3), []
    layer.register_state_dict_pre_hook(lambda m, prefix, keep: seen.append((prefix, keep)))
    layer.register_state_dict_post_hook(lambda m, d, prefix, meta: seen.append(list(d)))
    layer.register_load_state_dict_pre_hook(lambda m, d, *rest: seen.append(list(d)))
    layer.register_load_state_dict_post_hook(lambda m, keys: seen.append(str(keys)))
    layer.load_state_dict(layer.state_dict())
    return seen


@situation("a parameter and a module added to the layer")
def _(lib):
    layer = numbered(lib.BatchNorm2d(3))
    layer.register_parameter("extra", nn.Parameter(torch.ones(2)))
    layer.register_buffer("more", torch.ones(2), persistent=False)
    layer.add_module("inner", nn.Linear(2, 2, bias=False))
    return repr(layer), list(layer.state_dict()), step(layer, batch(4, 3, 2, 2))["y"]
