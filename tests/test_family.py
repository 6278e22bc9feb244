"""Instance, group, layer and root mean square normalization, against native layers in float64."""

import copy
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd import gradcheck, gradgradcheck

import batchnorm_ext
from batchnorm_ext import functional
from support import assert_bitwise, assert_within

pytestmark = [
    pytest.mark.only("cpu", reason="test_cuda_norms.py has those on CUDA"),
    pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning"),
]

C = 12


def instance(size, **options):
    return f"InstanceNorm{len(size) - 2}d", (size[1],), {"affine": True, **options}


NORMS = {
    "instance": instance,
    "instance, not affine": partial(instance, affine=False),
    "instance, tracking": partial(instance, track_running_stats=True),
    "group": lambda size: ("GroupNorm", (2, size[1]), {}),
    "group, all channels": lambda size: ("GroupNorm", (1, size[1]), {}),
    "group, not affine": lambda size: ("GroupNorm", (size[1] // 2, size[1]), {"affine": False}),
    "layer": lambda size: ("LayerNorm", (size[-1],), {}),
    "layer, samples": lambda size: ("LayerNorm", (size[1:],), {}),
    "layer, no bias": lambda size: ("LayerNorm", (size[-1],), {"bias": False}),
    "rms": lambda size: ("RMSNorm", (size[-1],), {}),
    "rms, samples": lambda size: ("RMSNorm", (size[1:],), {"eps": 1e-3}),
    "rms, not affine": lambda size: ("RMSNorm", (size[-1],), {"elementwise_affine": False}),
}
# (N, C, L), images of few and of many elements, volumes; rows of a group that are short and long
SIZES = [
    (5, C, 7),
    (3, C, 5, 3),
    (2, C, 24, 25),
    (2, C, 130, 131),
    (2, C, 3, 5, 8),
    (70, C, 1, 5),
    (3, 300, 3, 3),
]
FEW = [(5, C, 7), (3, C, 5, 3), (2, C, 24, 25)]
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
LAYOUTS = ["contiguous", "channels last", "sliced", "samples last"]


def orders(sizes, layouts=LAYOUTS):
    """Each size in each order of memory that it has: channels_last is for images and volumes."""
    pairs = [(s, o) for s in sizes for o in layouts if o != "channels last" or len(s) in (4, 5)]
    return pytest.mark.parametrize("size, layout", pairs)


every_norm = pytest.mark.parametrize("norm", NORMS)


def arranged(x, layout):
    """x in another order of memory."""
    if layout == "channels last":
        formats = {4: torch.channels_last, 5: torch.channels_last_3d}
        return x.to(memory_format=formats[x.dim()])
    if layout == "sliced":
        return torch.cat([x, x], 1)[:, : x.size(1)]
    if layout == "samples last":
        return x.movedim(0, -1).contiguous().movedim(-1, 0)
    return x


def layers(norm, size, dtype=torch.float32):
    """The native layer and ours, with the same parameters, not 1 and 0."""
    name, arguments, options = NORMS[norm](size)
    native, ours = (
        getattr(package, name)(*arguments, **options).to(dtype) for package in (nn, batchnorm_ext)
    )
    for parameter in native.parameters():
        nn.init.uniform_(parameter, -2, 2)
    ours.load_state_dict(native.state_dict())
    return native, ours


def gradients_of(layer, x, dy):
    x = x.detach().requires_grad_()
    y = layer(x)
    return [y, *torch.autograd.grad(y, [x, *layer.parameters()], dy.to(y.dtype))]


NAMES = ("y", "dx", "dweight", "dbias")


@every_norm
@pytest.mark.parametrize("dtype", DTYPES)
@orders(SIZES)
def test_forward_and_gradients(norm, size, layout, dtype):
    x, dy = (torch.randn(size) * 2 + 1).to(dtype), torch.randn(size).to(dtype)
    x = arranged(x, layout)
    native, ours = layers(norm, size, dtype)
    exact = copy.deepcopy(native).double()
    if exact.eps is None:  # stands for another value in float64
        exact.eps = functional.default_rms_eps(dtype)
    expected = gradients_of(exact, x.double().contiguous(), dy.double())
    for name, actual, exact in zip(NAMES, gradients_of(ours, x, dy), expected, strict=False):
        assert actual.dtype == dtype
        # sums in float32 over at most 2e5 elements of terms of both signs, relative to the largest
        # result, and the rounding of the result
        arithmetic = 64 * torch.finfo(torch.promote_types(dtype, torch.float32)).eps
        bound = exact.abs() * torch.finfo(dtype).eps / 2 + exact.abs().max() * arithmetic
        assert_within(name, actual, exact, bound)
    if norm.startswith(("instance", "group")) and layout in ("contiguous", "channels last"):
        assert ours(x).stride() == x.stride()


@every_norm
@pytest.mark.parametrize("size", FEW)
@pytest.mark.parametrize("ratio", [0.0, 1e2, 1e4])
def test_output_is_accurate_at_any_mean(norm, size, ratio):
    """The bound of README: 4e-7 of the output's scale. Root mean squares have no small variance."""
    x = torch.randn(size) + ratio
    native, ours = layers(norm, size)
    exact = copy.deepcopy(native).double()
    if exact.eps is None:
        exact.eps = functional.default_rms_eps(x.dtype)
    exact = exact(x.double())
    bound = 4e-7 * exact.abs().max() + exact.abs() * torch.finfo(torch.float32).eps / 2
    assert_within("y", ours(x), exact, bound)


@every_norm
@orders([(3, 4, 5), (2, 4, 3, 2)], ["contiguous", "channels last"])
@pytest.mark.parametrize("check", [gradcheck, gradgradcheck])
def test_derivatives(norm, size, layout, check):
    x = arranged(torch.randn(size, dtype=torch.float64), layout)
    _, ours = layers(norm, size, torch.float64)
    names = [name for name, _ in ours.named_parameters()]

    def function(x, *values):
        return torch.func.functional_call(ours, dict(zip(names, values, strict=True)), (x,))

    assert check(function, (x.requires_grad_(), *ours.parameters()))


@every_norm
@pytest.mark.usefixtures("fresh_dynamo")
def test_compiled_in_one_graph(norm):
    size = (2, 4, 6, 5)
    _, ours = layers(norm, size)
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    x, dy = torch.randn(size), torch.randn(size)
    for name, actual, expected in zip(
        NAMES, gradients_of(compiled, x, dy), gradients_of(ours, x, dy), strict=False
    ):
        assert_bitwise(name, actual, expected)


@pytest.mark.parametrize("size, groups, centred", [((3, 4, 5), 2, True), ((3, 4), 1, False)])
def test_operator(size, groups, centred):
    x, weight, bias = (torch.randn(s, requires_grad=True) for s in (size, 4, 4))
    arguments = (x, weight, bias, None, None, True, 1e-5, groups, centred)
    torch.library.opcheck(torch.ops.batchnorm_ext.batch_norm, arguments)
    torch.library.opcheck(
        torch.ops.batchnorm_ext.layer_norm, (x, [size[-1]], None, None, centred, 1e-5)
    )


@every_norm
@pytest.mark.parametrize("size", [(64, 64, 14, 14), (8, 40, 64, 64)])
def test_same_bits_for_any_number_of_threads(norm, size):
    _, ours = layers(norm, size)
    x, dy = torch.randn(size), torch.randn(size)
    threads = torch.get_num_threads()
    results = []
    try:
        for number in (1, 2, 3):
            torch.set_num_threads(number)
            results.append(gradients_of(ours, x, dy))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        for name, actual, expected in zip(NAMES, other, results[0], strict=False):
            assert_bitwise(name, actual, expected)


@pytest.mark.parametrize("size", FEW)
@pytest.mark.parametrize("momentum", [0.1, 1.0, None])
def test_running_statistics_of_instances(size, momentum):
    name = f"InstanceNorm{len(size) - 2}d"
    native, ours = (
        getattr(package, name)(C, track_running_stats=True, momentum=momentum)
        for package in (nn, batchnorm_ext)
    )
    for _ in range(3):
        x = torch.randn(size) * 3 + 1
        assert_within("y", ours(x), native(x), 2e-6)
    for buffer, expected in native.state_dict().items():
        assert_within(buffer, ours.state_dict()[buffer], expected, 2e-6)
    assert_within("evaluation", ours.eval()(x), native.eval()(x), 2e-6)


def test_recomputed_forward_tracks_once():
    layer = batchnorm_ext.InstanceNorm2d(C, track_running_stats=True)
    once = copy.deepcopy(layer)
    x = torch.randn(2, C, 5, 5, requires_grad=True)
    once(x)
    torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=False).sum().backward()
    assert_bitwise("running_mean", layer.running_mean, once.running_mean)
    assert_bitwise("running_var", layer.running_var, once.running_var)


@every_norm
def test_constant_has_no_variance(norm):
    """Whatever the constant: each result is the bias, or the sign of the constant in its place."""
    size = (2, 4, 9, 9)
    _, ours = layers(norm, size)
    for parameter in ours.parameters():
        nn.init.ones_(parameter)
    for value in (1000.1, -3e30, 1e-20):
        y = ours(torch.full(size, value))
        if norm.startswith("rms"):
            assert_within("y", y, y.mean().expand(size), 1e-6)
        else:
            expected = 1.0 if getattr(ours, "bias", None) is not None else 0.0
            assert_bitwise("y", y, torch.full(size, expected))


@every_norm
@pytest.mark.parametrize("scale", [1e-30, 1e30, 1e37])
def test_range_of_float32(norm, scale):
    size = (2, 4, 9, 9)
    native, ours = layers(norm, size)
    native.eps = ours.eps = 1e-42 if scale < 1 else 1e-5
    x = torch.randn(size) * scale
    native.double()
    exact = native(x.double()).detach()
    assert_within("y", ours(x), exact, exact.abs().max() * 1e-6)


@every_norm
def test_nan_stays_in_its_sample(norm):
    size = (3, 4, 9, 9)
    _, ours = layers(norm, size)
    x = torch.randn(size)
    clean = ours(x)
    x[1, 2, 3, 4] = torch.nan
    y = ours(x)
    assert y[1].isnan().any()
    assert_bitwise("other samples", y[::2], clean[::2])


@every_norm
def test_empty_batch(norm):
    native, ours = layers(norm, (0, 4, 3, 3))
    x = torch.randn(0, 4, 3, 3)
    if norm.startswith("instance") and norm != "instance, not affine":
        with pytest.raises(IndexError):
            native(x)
        with pytest.raises(IndexError):
            ours(x)
        return
    assert ours(x).shape == native(x).shape
    for actual, expected in zip(gradients_of(ours, x, x), gradients_of(native, x, x), strict=True):
        assert_bitwise("empty", actual, expected)


CALLS = {
    "one element for all samples": lambda package: package.GroupNorm(2, 2)(torch.randn(1, 2)),
    "one element for each statistic": lambda package: package.GroupNorm(2, 2)(torch.ones(3, 2)),
    "one element": lambda package: package.InstanceNorm1d(3)(torch.randn(2, 3, 1)),
    "channels not divisible": lambda package: package.GroupNorm(2, 6)(torch.randn(2, 5, 3)),
    "other channels": lambda package: package.GroupNorm(2, 6)(torch.randn(2, 8, 3)),
    "other features": lambda package: package.InstanceNorm1d(3, affine=True)(torch.randn(2, 4, 5)),
    "one dimension": lambda package: package.GroupNorm(2, 6)(torch.randn(6)),
    "dimensions of an instance": lambda package: package.InstanceNorm2d(3)(torch.randn(4)),
    "integers": lambda package: package.GroupNorm(2, 6)(torch.ones(2, 6, 3, dtype=torch.long)),
    "integers in rows": lambda package: package.LayerNorm(6)(torch.ones(2, 6, dtype=torch.long)),
    "negative eps": lambda package: package.GroupNorm(2, 6, eps=-1.0)(torch.ones(2, 6, 3)),
    "other shape": lambda package: package.LayerNorm(6)(torch.randn(2, 5)),
    "too few dimensions": lambda package: package.LayerNorm((3, 6))(torch.randn(6)),
    "rows of one": lambda package: package.LayerNorm(1)(torch.randn(4, 1)),
    "other shape, rms": lambda package: package.RMSNorm(6)(torch.randn(2, 5)),
    "integers, rms": lambda package: package.RMSNorm(6)(torch.ones(2, 6, dtype=torch.long)),
    "half input": lambda package: package.LayerNorm(6)(torch.ones(2, 6).bfloat16()),
    "half input, groups": lambda package: package.GroupNorm(2, 6)(torch.ones(2, 6, 2).bfloat16()),
    "half parameters": lambda package: package.LayerNorm(6).bfloat16()(torch.ones(2, 6)),
    "sparse": lambda package: package.LayerNorm(6)(torch.ones(2, 6).to_sparse()),
    "complex": lambda package: package.LayerNorm(6)(torch.ones(2, 6, dtype=torch.complex64)),
    "num_groups of another type": lambda package: functions(package).group_norm(
        torch.ones(2, 6, 2), 2.0
    ),
    "shape as a number": lambda package: functions(package).layer_norm(torch.ones(2, 6), 6),
    "shape as a size": lambda package: functions(package).layer_norm(
        torch.ones(2, 6), torch.Size([6])
    ),
    "eps None": lambda package: functions(package).layer_norm(torch.ones(2, 6), (6,), eps=None),
    "no shape": lambda package: functions(package).layer_norm(torch.ones(2, 6), ()),
}


def functions(package):
    return F if package is nn else functional


@pytest.mark.parametrize("call", CALLS)
def test_result_or_error_of_native(call):
    def outcome(package):
        try:
            y = CALLS[call](package)
        except Exception as error:
            return type(error).__name__, str(error)
        return y.dtype, y.shape, y.stride()

    assert outcome(batchnorm_ext) == outcome(nn)


@every_norm
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("parameters", [torch.float32, torch.bfloat16])
def test_dtype_under_autocast(norm, dtype, parameters):
    size = (2, 4, 6, 5)
    x = torch.randn(size, dtype=dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        try:
            expected = layers(norm, size, parameters)[0](x)
        except RuntimeError:
            return  # native does not mix these; ours may
        native, ours = layers(norm, size, parameters)
        actual = ours(x)
        assert actual.dtype == expected.dtype
        assert_within("y", actual, native(x), 0.05 * native(x).abs().max())


def _export(model, x):
    graph = torch.export.export(model, (x,), strict=False).graph
    return [(str(node.target), len(node.users)) for node in graph.nodes]


def _trace(model, x):
    return [node.kind() for node in torch.jit.trace(model, x).inlined_graph.nodes()]


def _script(model, x):
    return [node.kind() for node in torch.jit.script(model).inlined_graph.nodes()]


def _fx(model, x):
    return [(node.op, node.target) for node in torch.fx.symbolic_trace(model).graph.nodes]


@every_norm
@pytest.mark.parametrize("graph_of", [_export, _trace, _script, _fx])
def test_artefact_is_that_of_native(norm, graph_of):
    size = (2, 4, 6, 5)
    native, ours = (nn.Sequential(nn.Identity(), layer) for layer in layers(norm, size))
    x = torch.randn(size)
    assert graph_of(ours, x) == graph_of(native, x)


@every_norm
def test_convert_and_revert(norm):
    native, ours = layers(norm, (2, 4, 6, 5))
    state = copy.deepcopy(native.__dict__)
    assert type(batchnorm_ext.convert(native)) is type(ours)
    assert type(batchnorm_ext.revert(native)) is type(native)
    assert native.__dict__.keys() == state.keys()
    assert type(ours).__mro__[1].__module__.startswith("batchnorm_ext")


def test_convert_picks_classes():
    model = nn.Sequential(nn.BatchNorm2d(4), nn.GroupNorm(2, 4), nn.LayerNorm(4))
    batchnorm_ext.convert(model, norms=(nn.BatchNorm2d, nn.LayerNorm))
    assert [type(layer) for layer in model] == [
        batchnorm_ext.BatchNorm2d,
        nn.GroupNorm,
        batchnorm_ext.LayerNorm,
    ]
    with pytest.raises(ValueError, match="expected norms to be classes of torch.nn among"):
        batchnorm_ext.convert(model, norms=(nn.Linear,))


@pytest.mark.parametrize("name", ["instance_norm", "group_norm", "layer_norm", "rms_norm"])
def test_replaced_function_is_called(name, monkeypatch):
    size = (2, 4, 6, 5)
    norm = name.removesuffix("_norm")
    _, ours = layers(norm, size)
    monkeypatch.setattr(F, name, lambda *arguments: "replaced")
    assert ours(torch.randn(size)) == "replaced"
