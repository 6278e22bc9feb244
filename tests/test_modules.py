"""The modules as drop-ins: training next to native ones, state, copies, precision modes."""

import copy
import inspect
import io
import pickle

import pytest
import torch
from torch import nn

import batchnorm_ext
from cases import LAYOUTS
from support import assert_bitwise

KINDS = {
    "BatchNorm1d": (6, 3, 5),
    "BatchNorm2d": (4, 3, 5, 6),
    "BatchNorm3d": (2, 3, 4, 5, 6),
}
OPTIONS = [
    {},
    {"affine": False},
    {"track_running_stats": False},
    {"momentum": None},
    {"momentum": 0.0},
    {"eps": 1e-2, "momentum": 0.7},
    {"affine": False, "track_running_stats": False},
    *([{"bias": False}] if "bias" in inspect.signature(nn.BatchNorm1d).parameters else []),
]
# float32 against native float32 on a few dozen elements of order 1 per channel: both have
# errors of a few roundings, which a few steps of training amplify little
CLOSE = {"rtol": 1e-5, "atol": 1e-5}

every_kind = pytest.mark.parametrize("kind", KINDS)


def _pair(device, kind, **options):
    native = getattr(nn, kind)(3, device=device, **options)
    with torch.no_grad():
        for parameter in native.parameters():
            parameter.normal_()
    ours = getattr(batchnorm_ext, kind)(3, device=device, **options)
    ours.load_state_dict(native.state_dict())
    return native, ours


def _assert_same_state(actual, expected):
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(actual[name], value, **CLOSE, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@every_kind
def test_trains_as_native(kind, options, device):
    """Three steps of SGD and an evaluation, in both memory formats."""
    modules = _pair(device, kind, **options)
    native, ours = modules
    optimizers = [
        torch.optim.SGD([*m.parameters(), nn.Parameter(torch.zeros(1, device=device))], lr=0.1)
        for m in modules
    ]
    for step in range(3):
        layout = "channels_last" if step % 2 else "contiguous"
        x = LAYOUTS[layout](torch.randn(KINDS[kind], device=device))
        weights = torch.randn_like(x)
        inputs = [x.clone().requires_grad_() for _ in modules]
        outputs = []
        for module, optimizer, leaf in zip(modules, optimizers, inputs, strict=True):
            outputs.append(module(leaf))
            optimizer.zero_grad()
            (outputs[-1] * weights).sum().backward()
            optimizer.step()
        torch.testing.assert_close(outputs[1], outputs[0], **CLOSE)
        torch.testing.assert_close(inputs[1].grad, inputs[0].grad, **CLOSE)
        _assert_same_state(ours.state_dict(), native.state_dict())
    x = torch.randn(KINDS[kind], device=device)
    torch.testing.assert_close(ours.eval()(x), native.eval()(x), **CLOSE)
    _assert_same_state(ours.state_dict(), native.state_dict())


@every_kind
def test_class(kind):
    native, ours = getattr(nn, kind), getattr(batchnorm_ext, kind)
    assert issubclass(ours, native) and ours.__name__ == kind
    assert inspect.signature(ours) == inspect.signature(native)
    for options in OPTIONS:
        assert repr(ours(7, **options)) == repr(native(7, **options))


def test_one_dimension_takes_two_sizes(device):
    native, ours = _pair(device, "BatchNorm1d")
    for size in [(9, 3), (9, 3, 4)]:
        x = torch.randn(size, device=device)
        torch.testing.assert_close(ours(x), native(x), **CLOSE)


@every_kind
def test_state_dict_both_ways(kind, device):
    native, ours = _pair(device, kind)
    native(torch.randn(KINDS[kind], device=device))
    ours.load_state_dict(native.state_dict(), strict=True)
    for name, value in native.state_dict().items():
        assert_bitwise(name, ours.state_dict()[name], value)
    ours(torch.randn(KINDS[kind], device=device))
    native.load_state_dict(ours.state_dict(), strict=True)
    for name, value in ours.state_dict().items():
        assert_bitwise(name, native.state_dict()[name], value)
    assert ours.state_dict()._metadata == native.state_dict()._metadata


def test_state_dict_without_a_counter():
    """Files from before PyTorch 0.4.1 hold no num_batches_tracked."""
    ours = batchnorm_ext.BatchNorm2d(3)
    old = copy.copy(nn.BatchNorm2d(3).state_dict())
    del old["num_batches_tracked"]
    old._metadata[""]["version"] = 1
    ours.load_state_dict(old, strict=True)
    assert ours.num_batches_tracked.item() == 0


def _through_torch_save(module):
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize(
    "duplicate",
    [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), _through_torch_save],
    ids=["deepcopy", "pickle", "torch.save"],
)
@every_kind
def test_copies(kind, duplicate, device):
    _, module = _pair(device, kind)
    x = torch.randn(KINDS[kind], device=device)
    module(x)
    other = duplicate(module)
    assert type(other) is type(module) and other.weight is not module.weight
    before = {n: v.clone() for n, v in module.state_dict().items()}
    assert_bitwise("y", other(x), copy.deepcopy(module)(x))
    assert other.num_batches_tracked.item() == 2
    for name, value in module.state_dict().items():
        assert_bitwise(f"{name} of the original", value, before[name])


def test_state_dict_loads_with_weights_only():
    file = io.BytesIO()
    state = batchnorm_ext.BatchNorm2d(3).state_dict()
    torch.save({name: value + 1 for name, value in state.items()}, file)
    file.seek(0)
    module = batchnorm_ext.BatchNorm2d(3)
    module.load_state_dict(torch.load(file, weights_only=True))
    for name, value in module.state_dict().items():
        assert_bitwise(name, value, state[name] + 1)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("training", [True, False])
def test_without_gradients(training, mode, device):
    native, ours = _pair(device, "BatchNorm2d")
    x = torch.randn(KINDS["BatchNorm2d"], device=device)
    outputs = []
    for module in (native, ours):
        with mode():
            outputs.append(module.train(training)(x))
    assert not outputs[1].requires_grad and outputs[1].is_inference() == outputs[0].is_inference()
    torch.testing.assert_close(outputs[1], outputs[0], **CLOSE)
    _assert_same_state(ours.state_dict(), native.state_dict())
    assert ours.num_batches_tracked.item() == int(training)


def test_empty_batch_is_not_counted(device):
    """Unlike native PyTorch, which counts it, so that its cumulative average is then wrong."""
    module = batchnorm_ext.BatchNorm2d(3, momentum=None, device=device)
    x = torch.randn(0, 3, 4, 4, device=device, requires_grad=True)
    module(x).sum().backward()
    assert module.num_batches_tracked.item() == 0
    assert module.running_mean.eq(0).all() and module.running_var.eq(1).all()
    assert x.grad.shape == x.shape and module.weight.grad.tolist() == [0, 0, 0]


def test_cumulative_average_over_batches(device):
    module = batchnorm_ext.BatchNorm1d(2, momentum=None, device=device).double()
    batches = torch.randn(5, 8, 2, dtype=torch.float64, device=device)
    for x in batches:
        module(x)
    torch.testing.assert_close(module.running_mean, batches.mean((0, 1)))
    torch.testing.assert_close(module.running_var, batches.var(1).mean(0))


@pytest.mark.parametrize("kind", ["LazyBatchNorm1d", "LazyBatchNorm2d", "LazyBatchNorm3d"])
def test_lazy(kind, device):
    eager = kind.removeprefix("Lazy")
    options = {"eps": 1e-3, "device": device}
    ours, native = getattr(batchnorm_ext, kind)(**options), getattr(nn, kind)(**options)
    assert isinstance(ours, getattr(nn, kind)) and repr(ours) == repr(native)
    x = torch.randn(KINDS[eager], device=device)
    torch.testing.assert_close(ours(x), native(x), **CLOSE)
    assert type(ours) is getattr(batchnorm_ext, eager) and ours.num_features == 3
    _assert_same_state(ours.state_dict(), native.state_dict())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype, device):
    """Activations in low precision, everything that is stored in float32."""
    torch.manual_seed(3)
    convolution = nn.Conv2d(3, 8, 3, bias=False)  # the gradient of a bias would be zero and noise
    native = nn.Sequential(convolution, nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3))
    native = native.to(device)
    ours = batchnorm_ext.convert(copy.deepcopy(native))
    x = torch.randn(4, 3, 12, 12, device=device)
    outputs, between = [], []
    for model in (native, ours):
        model[1].register_forward_hook(lambda _, args, y: between.append((args[0].dtype, y)))
        with torch.autocast(device.type, dtype=dtype):
            y = model(x)
        y.float().pow(2).mean().backward()
        outputs.append(y)
    (native_in, native_y), (our_in, our_y) = between
    assert native_in == our_in == dtype and our_y.dtype == native_y.dtype
    # one rounding to the low precision apart at the batch norm, and a few more behind it
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(our_y, native_y, rtol=eps, atol=eps)
    torch.testing.assert_close(outputs[1], outputs[0], rtol=4 * eps, atol=4 * eps)
    for (name, a), b in zip(ours.named_parameters(), native.parameters(), strict=True):
        assert a.dtype == a.grad.dtype == torch.float32
        bound = 8 * eps * b.grad.abs().max().item()
        torch.testing.assert_close(a.grad, b.grad, rtol=0, atol=bound, msg=lambda m, n=name: n + m)
    for name in ("running_mean", "running_var"):
        value = getattr(ours[1], name)
        assert value.dtype == torch.float32
        # the inputs are the same, so only the order of the sums differs; native sums are float32
        torch.testing.assert_close(value, getattr(native[1], name), rtol=1e-5, atol=1e-6)


def test_autocast_leaves_a_float32_input_alone(device):
    module, plain = (batchnorm_ext.BatchNorm2d(3, device=device) for _ in range(2))
    x = torch.randn(2, 3, 4, 4, device=device)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        y = module(x)
    assert_bitwise("y", y, plain(x))
    for name, value in plain.state_dict().items():
        assert_bitwise(name, module.state_dict()[name], value)


def test_module_in_half_precision(device):
    """``model.bfloat16()``: parameters and statistics are of the dtype of the activations."""
    native, ours = (m.bfloat16() for m in _pair(device, "BatchNorm2d"))
    x = torch.randn(8, 3, 16, 16, device=device).bfloat16()
    expected = native(x)
    # native rounds scale and shift to bfloat16, too: a few roundings of the largest values
    atol = 2 * torch.finfo(torch.bfloat16).eps * expected.abs().max().item()
    torch.testing.assert_close(ours(x), expected, rtol=0, atol=atol)
    for name in ("running_mean", "running_var"):
        assert getattr(ours, name).dtype == torch.bfloat16
        torch.testing.assert_close(getattr(ours, name), getattr(native, name))


def test_functional_call(device):
    native, ours = _pair(device, "BatchNorm2d")
    x = torch.randn(KINDS["BatchNorm2d"], device=device)
    state = {n: v.clone() for n, v in ours.state_dict().items()}
    y = torch.func.functional_call(ours, state, x)
    torch.testing.assert_close(y, native(x), **CLOSE)
    assert state["num_batches_tracked"].item() == 1 and ours.num_batches_tracked.item() == 0
    torch.testing.assert_close(state["running_mean"], native.running_mean, **CLOSE)


def test_checkpointing(device):
    """Recomputation in the backward gives the gradients of the plain backward."""
    module = batchnorm_ext.BatchNorm2d(3, device=device)
    x = torch.randn(4, 3, 5, 5, device=device, requires_grad=True)
    (expected,) = torch.autograd.grad(module(x).pow(3).sum(), x)
    y = torch.utils.checkpoint.checkpoint(module, x, use_reentrant=False)
    assert_bitwise("dx", torch.autograd.grad(y.pow(3).sum(), x)[0], expected)


def test_fx_tracing(device):
    model = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)).eval().to(device)
    x = torch.randn(2, 3, 4, 4, device=device)
    model(x)
    batchnorm_ext.convert(model)
    assert_bitwise("y", torch.fx.symbolic_trace(model)(x), model(x))


def test_jit_tracing(device):
    module = batchnorm_ext.BatchNorm2d(3, device=device).eval()
    x = torch.randn(2, 3, 4, 4, device=device)
    traced = torch.jit.trace(module, x)(2 * x)  # by PyTorch's own function
    torch.testing.assert_close(traced, module(2 * x), rtol=0, atol=1e-6)
