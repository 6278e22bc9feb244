"""Outputs of norms that are computed again for backward: the same bits, and what is kept."""

import copy
import gc
import itertools
import logging
import re
import threading
from contextlib import nullcontext
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._C._autograd import _top_saved_tensors_default_hooks as top_hooks
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import batchnorm_ext
import fusing
from activations import ACTIVATIONS, INPUTS, NORMS, C, fused, gradients, make_problem
from batchnorm_ext import (
    BatchNorm2d,
    BatchNormAct2d,
    GroupNormAct,
    _recompute,
    recompute_activations,
)
from benchmarks import networks
from cases import DTYPES
from fusing import conv
from keeping import kept_bytes, saved_bytes
from support import assert_bitwise, ops

everything = partial(recompute_activations, 1)  # with more to look at than the default
SIZE = (4, C, 16, 16)
BYTES = 4 * 4 * C * 16 * 16  # of a float32 tensor of that size


@pytest.fixture(autouse=True)
def _no_hooks_are_left():
    yield
    assert top_hooks(True) is None


# The operator


@pytest.mark.parametrize("activation", ["", *ACTIVATIONS])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_map_gives_the_same_bits(dtype, activation, device):
    name = batchnorm_ext._activations.activation_name(activation)
    for (size, layout), norm, has_residual in itertools.product(INPUTS, NORMS, (False, True)):
        groups = {"instance": C, "group": 2}.get(norm, 0)
        if (len(size) == 2 and groups) or (has_residual and activation == "leaky_relu(-0.5)"):
            continue
        if device.type == "cuda" and dtype == torch.float64 and (name or has_residual):
            continue  # there are no kernels for these
        p = make_problem(size, layout, dtype, has_residual, device)
        training = norm != "batch, evaluation"
        tensors = [p.x, p.weight, p.bias]
        state = [None, None] if training else [p.mean, p.var]
        with torch.no_grad():
            y, stats = ops.batch_norm(
                *tensors, *state, training, 1e-5, groups, True, 1, p.residual, name
            )
            again = ops.batch_norm_map(*tensors, stats, training, groups, p.residual, name)
        assert again.stride() == y.stride()
        assert_bitwise(f"{size}, {layout}, {norm}, residual {has_residual}", again, y)


@pytest.mark.parametrize(
    "scale, centre", [(1, 1e4), (1e-3, 1e6), (3e37, 0), (1e30, 3e38), (1e-38, 0)]
)
def test_the_map_of_extreme_channels(scale, centre, device):
    """Statistics that the forward mends, and centres that depend on the number of elements."""
    x = (
        torch.randn(3, C, 40, 9)
        .double()
        .mul(scale)
        .add(centre)
        .clamp(-3.4e38, 3.4e38)
        .float()
        .to(device)
    )
    for groups in (0, 2, C):
        y, stats = ops.batch_norm(x, None, None, None, None, True, 1e-5, groups)
        assert_bitwise("y", ops.batch_norm_map(x, None, None, stats, True, groups, None, ""), y)


def test_what_the_map_refuses():
    x, stats = torch.randn(5, C), torch.zeros(2, C, dtype=torch.float64)
    with pytest.raises(NotImplementedError, match="more than one element per sample and channel"):
        ops.batch_norm_map(x, None, None, stats[:, :5].contiguous(), True, 1, None, "")
    with pytest.raises(RuntimeError, match=r"expected stats to be .* of size \[2, 8\]"):
        ops.batch_norm_map(x, None, None, stats[:, 1:].contiguous(), True, 0, None, "")
    with pytest.raises(RuntimeError, match="expected residual like input"):
        ops.batch_norm_map(x, None, None, stats, True, 0, x[1:], "relu")
    with pytest.raises(NotImplementedError, match="weight should contain 8 elements not 3"):
        ops.batch_norm_map(x, torch.ones(3), None, stats, True, 0, None, "")
    y = ops.batch_norm_map(x.to("meta"), None, None, stats.to("meta"), True, 0, None, "relu")
    assert y.is_meta and y.shape == x.shape


# Gradients


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size, layout", [INPUTS[0], INPUTS[2], INPUTS[4], INPUTS[8]], ids=str)
def test_gradients_are_the_same_bits(size, layout, dtype, activation, device):
    for norm, has_residual in itertools.product(NORMS, (False, True)):
        p = make_problem(size, layout, dtype, has_residual, device)

        def found(context, norm=norm, p=p):
            with context():
                y = fused(p, norm, activation)
                return gradients(y * y.sin(), p)

        expected, actual = found(nullcontext), found(everything)
        for name, value in expected.items():
            assert_bitwise(f"{name}, {norm}, residual {has_residual}", actual[name], value)


@pytest.mark.parametrize("activation", ["relu", "silu", "identity"])
def test_derivatives_of_second_order_and_backward_twice(activation):
    p = make_problem((3, C, 5, 4), "contiguous", torch.float64, True)
    leaves = list(p.leaves.values())

    def found(context):
        with context():
            y = fused(p, "batch, training", activation)
            loss = (y * y.sin()).square().sum()
        first = torch.autograd.grad(loss, leaves, retain_graph=True)
        again = torch.autograd.grad(loss, leaves, create_graph=True)
        second = torch.autograd.grad(sum(g.sin().sum() for g in again), leaves)
        return [*first, *again, *second]

    for actual, expected in zip(found(everything), found(nullcontext), strict=True):
        assert_bitwise("gradient", actual, expected)


def step(model, x, context=nullcontext, optimizer=None):
    model = copy.deepcopy(model)
    with context():
        loss = model(x).float().square().mean()
    loss.backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    return {"loss": loss.detach()} | gradients | dict(model.named_buffers())


def assert_same_steps(model, x, context=everything):
    expected, actual = step(model, x), step(model, x, context)
    assert expected.keys() == actual.keys()
    for name, value in expected.items():
        assert_bitwise(name, actual[name], value)


NETWORKS = {
    "resnet": fusing.ResNet,
    "resnet50": networks.resnet50,
    "mobilenetv2": networks.mobilenetv2,
    "basic blocks": lambda: nn.Sequential(*(fusing.BasicBlock(3, 3) for _ in range(5))),
    "preactivation": lambda: nn.Sequential(conv(3), *(fusing.PreActivation() for _ in range(3))),
    "plain norms": lambda: nn.Sequential(conv(3), fusing.norm(), fusing.norm(), conv()),
}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("name", NETWORKS)
def test_networks(name, memory_format, training):
    model = batchnorm_ext.convert(batchnorm_ext.fuse(NETWORKS[name]())).train(training)
    x = torch.randn(2, 3, 32, 32).to(memory_format=memory_format)
    assert_same_steps(model.to(memory_format=memory_format), x)


# What is kept


# of what native keeps; all would be 0.37 and 0.65, and 0.70 and 1.01 if only fused
@pytest.mark.parametrize("name, most, least", [("mobilenetv2", 0.55, 0.4), ("resnet50", 0.8, 0.7)])
def test_kept_bytes_of_networks(name, most, least):
    native = networks.NETWORKS[name]()
    model = batchnorm_ext.fuse(copy.deepcopy(native))
    x = torch.randn(2, 3, 64, 64)
    given = (*native.parameters(), *native.buffers(), x)
    of_native = kept_bytes(lambda: native(x).sum(), given)
    # two ways to count; in the graph are some scalars as well
    assert saved_bytes(lambda: native(x).sum(), given) == pytest.approx(of_native, rel=1e-3)
    given = (*model.parameters(), *model.buffers(), x)

    def kept(context):
        return kept_bytes(lambda: model(x).sum(), given, context) / of_native

    assert kept(nullcontext) <= 1.02  # statistics in float64
    assert least < kept(recompute_activations) <= most
    assert kept(everything) <= least


def test_share():
    """Of outputs of one size, and of a smaller one: what is due to a large one goes to it."""
    x, small = torch.randn(SIZE, requires_grad=True), torch.randn(C, C, requires_grad=True)
    layer, flat = BatchNormAct2d(C), batchnorm_ext.BatchNormAct1d(C)

    def run():
        outputs = [layer(x) for _ in range(10)]
        return sum((y * y).sum() for y in (*outputs, flat(small)))

    for share, kept in [(0.05, 10), (0.25, 8), (0.5, 5), (1, 0)]:
        context = partial(recompute_activations, share)
        assert round(tensors_kept(run, context, [x, small])) == kept
    for share in (0, -1, 1.5, float("nan")):
        with pytest.raises(ValueError, match="expected share to be positive and at most 1"):
            recompute_activations(share).__enter__()


def test_shares_of_contexts_in_each_other():
    x, layer = torch.randn(SIZE, requires_grad=True), BatchNormAct2d(C)

    def run():
        with recompute_activations(0.5):
            first = layer(x)
            with everything():
                second = layer(x)
            third = layer(x)
            return sum((y * y).sum() for y in (first, second, third))

    assert tensors_kept(run, nullcontext, [x]) == 1  # the first


def tensors_kept(run, context=everything, given=()):
    """In units of a tensor of SIZE."""
    return round(kept_bytes(run, given, context) / BYTES, 1)


@pytest.mark.parametrize("activation, kept", [("identity", 2), ("relu", 2), ("silu", 3)])
def test_kept_tensors_of_one_norm(activation, kept):
    """Of a norm and a square: the input, and what is added in place of the output."""
    x, residual = torch.randn(2, *SIZE, requires_grad=True).unbind()
    layer = BatchNormAct2d(C, activation)

    def run(adds):
        y = layer(x * 1, residual * 1) if adds else layer(x * 1)
        return (y * y).sum()

    assert tensors_kept(lambda: run(False), nullcontext) == 2
    assert tensors_kept(lambda: run(False)) == 1
    assert tensors_kept(lambda: run(True), nullcontext) == kept
    assert tensors_kept(lambda: run(True)) == 2


def test_a_residual_is_not_kept_for_nothing():
    """Where nobody saves the sum, holding what was added would keep more than without."""
    x = torch.randn(SIZE, requires_grad=True)
    layer = BatchNormAct2d(C, "identity")

    def run():
        return (layer(x * 1, x * 2) + 1).sum()

    assert tensors_kept(run) == tensors_kept(run, nullcontext) == 1


def test_chains_of_residuals_end():
    """Each output needs the one before it: two of three are not kept."""
    x = torch.randn(SIZE, requires_grad=True)
    layers = [BatchNormAct2d(C, "relu") for _ in range(6)]

    def run():
        y = x * 1
        for layer in layers:
            y = layer(y * 2, y)
        return (y * y).sum()

    # the inputs of the norms, and the outputs
    assert tensors_kept(run, nullcontext) == 6 + 6
    assert tensors_kept(run) == 6 + 2 + 1  # the first residual is not an output


def test_views_of_outputs():
    x = torch.randn(SIZE, requires_grad=True)
    layer, linear = BatchNormAct2d(C), nn.Linear(C * 256, 3)

    def run():
        return linear(layer(x * 1).flatten(1)).sum()

    given = list(linear.parameters())
    assert tensors_kept(run, nullcontext, given) == 2 and tensors_kept(run, given=given) == 1
    model = nn.Sequential(layer, nn.Flatten(), linear)
    assert_same_steps(model, x.detach())


def imaginary_part(y):
    """Of the conjugate: a view with a lazy minus."""
    return torch.view_as_complex(y).conj().imag


@pytest.mark.parametrize("view", [torch.view_as_complex, imaginary_part])
def test_views_that_are_not_of_strides_alone_are_kept(view):
    layer, x = BatchNormAct2d(C, "silu"), torch.randn(4, C, 16, 2)

    def found(context):
        leaf = x.clone().requires_grad_()
        with context():
            z = view(layer(leaf * 1))
            loss = (z * z.sin()).abs().sum()
        return torch.autograd.grad(loss, [leaf, layer.weight])

    for actual, expected in zip(found(everything), found(nullcontext), strict=True):
        assert_bitwise("gradient", actual, expected)


def test_graphs_are_freed():
    """What is held for an output leads nowhere back."""
    x = torch.randn(SIZE, requires_grad=True)
    gc.disable()
    try:
        with everything():
            inputs = [x * 1, x * 2]
            y = BatchNormAct2d(C)(*inputs)
            loss = (y * y.sigmoid()).sum()
        held = [StorageWeakRef(tensor.untyped_storage()) for tensor in (*inputs, y)]
        del y, inputs
        assert [storage.expired() for storage in held] == [False, False, True]
        del loss
        assert all(storage.expired() for storage in held)
    finally:
        gc.enable()


def test_an_output_is_computed_once():
    """For several readers of one backward, and again for the next backward."""
    x = torch.randn(SIZE, requires_grad=True)
    layer = BatchNormAct2d(C)
    with everything():
        y = layer(x, x * 2)
        loss = (y * y.sigmoid() * y.exp()).sum()
    for _ in range(2):
        with torch.profiler.profile() as profile:
            loss.backward(retain_graph=True)
        calls = {event.key: event.count for event in profile.key_averages()}
        assert calls["batchnorm_ext::batch_norm_map"] == 1


@pytest.mark.only("cuda", reason="a CPU has no streams")
def test_readers_on_other_streams_compute_it_for_themselves():
    x = torch.randn(SIZE, device="cuda", requires_grad=True)
    layer, side = BatchNormAct2d(C, "silu").cuda(), torch.cuda.Stream()

    def found(context):
        with context():
            y = layer(x * 1)
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                beside = y.sigmoid() * y
            torch.cuda.current_stream().wait_stream(side)
            loss = (y * y.sin() + beside).sum()
        with torch.profiler.profile() as profile:
            gradients = torch.autograd.grad(loss, [x, layer.weight])
        calls = {event.key: event.count for event in profile.key_averages()}
        return gradients, calls.get("batchnorm_ext::batch_norm_map", 0)

    actual, expected = found(everything), found(nullcontext)
    assert (actual[1], expected[1]) == (2, 0)
    for gradient, wanted in zip(actual[0], expected[0], strict=True):
        assert_bitwise("gradient", gradient, wanted)


def test_a_bias_that_autograd_cannot_save_changes_nothing():
    """With a recipe it is saved, even where there is no activation."""
    layer, x = BatchNorm2d(C), torch.randn(SIZE, requires_grad=True)
    with torch.inference_mode():
        bias = torch.ones(C)

    def found(context):
        state = torch.zeros(C), torch.ones(C)
        with context():
            y = batchnorm_ext.functional.batch_norm(x, *state, layer.weight, bias, training=True)
            y = y * y.sin()
        return [y, *torch.autograd.grad(y.sum(), [x, layer.weight]), *state]

    for actual, expected in zip(found(everything), found(nullcontext), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)  # PyTorch's own norm


def test_norms_without_a_gradient_keep_their_output():
    """There is no graph that would hold their input."""
    layer = BatchNormAct2d(C).requires_grad_(False)
    weight = torch.ones(SIZE, requires_grad=True)
    x = torch.randn(SIZE)
    with everything():
        y = layer(x)
        (y * weight).sum().backward()
    assert_bitwise("gradient", weight.grad, y)


# Writing to tensors


@pytest.mark.parametrize("write", ["add_", "no_grad", "view"])
def test_outputs_that_are_written_to_are_kept(write):
    x = torch.randn(SIZE, requires_grad=True)
    layer = BatchNormAct2d(C)

    def found(context):
        with context():
            y = layer(x)
            if write == "no_grad":
                with torch.no_grad():
                    y.add_(1)
            else:
                (y if write == "add_" else y.view(-1)).add_(1)
            return torch.autograd.grad((y * y.sin()).sum(), [x, layer.weight])

    for actual, expected in zip(found(everything), found(nullcontext), strict=True):
        assert_bitwise("gradient", actual, expected)


def _written_input(layer, x):
    x = x.sin()
    loss = layer(x).square().sum()
    with torch.no_grad():
        x.add_(1)
    return loss


def _written_weight(layer, x):
    loss = layer(x).square().sum()
    with torch.no_grad():
        layer.weight.add_(1)
    return loss


def _written_factor(layer, x):
    y, factor = layer(x), x.exp()
    loss = (y * factor).sum()
    factor.add_(1)
    return loss


@pytest.mark.parametrize("run", [_written_input, _written_weight, _written_factor])
def test_what_is_needed_and_written_to_raises_as_natively(run):
    messages = []
    for context in (nullcontext, everything):
        layer, x = BatchNormAct2d(C), torch.randn(SIZE, requires_grad=True)
        with context():
            loss = run(layer, x)
        with pytest.raises(RuntimeError, match="modified by an inplace operation") as error:
            loss.backward()
        # which operation made it is not known any more
        messages.append(re.sub(", which is output .*? of .*?, is", " is", str(error.value)))
    assert messages[0] == messages[1]


# Beside other tools


def logged(caplog):
    """By this library; the compiler logs as well."""
    return [record.message for record in caplog.records if record.name == "batchnorm_ext"]


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("inside", [False, True])
def test_checkpointing(inside, use_reentrant):
    class Checkpointed(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = nn.Sequential(conv(3), BatchNormAct2d(6))
            self.block = nn.Sequential(conv(), BatchNormAct2d(6), conv(), BatchNormAct2d(6, "silu"))

        def run(self, x):
            with everything() if inside else nullcontext():
                return self.block(x).sin()

        def forward(self, x):
            return checkpoint(self.run, self.first(x), use_reentrant=use_reentrant).square()

    model, x = Checkpointed(), torch.randn(2, 3, 16, 16)
    expected = step(model, x)
    actual = step(model, x, everything)
    for name, value in expected.items():
        assert_bitwise(name, actual[name], value)


def test_other_hooks_win(caplog):
    _recompute.log_kept_once.cache_clear()
    caplog.set_level(logging.DEBUG, logger="batchnorm_ext")
    x, layer = torch.randn(SIZE, requires_grad=True), BatchNormAct2d(C)
    with torch.autograd.graph.save_on_cpu():
        hooks = top_hooks(True)
        for _ in range(2):
            with everything():
                assert top_hooks(True) == hooks
                layer(x).sin().sum().backward()
    assert logged(caplog) == [
        "recompute_activations has no effect within other hooks on saved tensors"
    ]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype):
    model = batchnorm_ext.fuse(fusing.ResNet())
    x = torch.randn(2, 3, 16, 16)
    with torch.autocast("cpu", dtype):
        assert_same_steps(model, x)
        assert_same_steps(nn.Sequential(BatchNormAct2d(3), conv(3), BatchNorm2d(6), conv()), x)


def train_ddp():
    torch.manual_seed(0)
    model, x = batchnorm_ext.fuse(fusing.ResNet()), torch.randn(2, 3, 16, 16)
    expected = step(model, x)
    actual = {}
    parallel = DistributedDataParallel(model)
    with everything():
        loss = parallel(x).float().square().mean()
    loss.backward()
    actual |= {name: parameter.grad for name, parameter in model.named_parameters()}
    for name, gradient in actual.items():
        assert_bitwise(name, gradient, expected[name])


def test_data_parallel(ranks):
    ranks(1).run(train_ddp)


@pytest.mark.parametrize("inside", [False, True])
def test_compiled_code_ignores_it(inside, caplog, fresh_dynamo):
    _recompute.log_kept_once.cache_clear()
    caplog.set_level(logging.DEBUG, logger="batchnorm_ext")
    model, x = (
        nn.Sequential(conv(3), BatchNormAct2d(6), conv(), BatchNorm2d(6)),
        torch.randn(2, 3, 9, 9),
    )

    def run(x):
        with everything() if inside else nullcontext():
            return model(x)

    before = copy.deepcopy(model.state_dict())
    expected = run(x)
    expected.square().sum().backward()
    gradients = [parameter.grad.clone() for parameter in model.parameters()]
    model.load_state_dict(before), model.zero_grad(), caplog.clear()
    compiled = torch.compile(run, backend="aot_eager", fullgraph=True)
    with nullcontext() if inside else everything():
        compiled(x).square().sum().backward()
    for parameter, gradient in zip(model.parameters(), gradients, strict=True):
        # the last norm is PyTorch's own
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-4, atol=1e-3)
    assert logged(caplog) == [
        "recompute_activations has no effect in compiled code: the compiler decides what it "
        "computes again"
    ]


def test_it_ends_with_an_exception():
    with pytest.raises(ZeroDivisionError), everything():
        assert _recompute.recomputes()
        with everything():
            raise ZeroDivisionError
    assert not _recompute.recomputes()


def test_it_holds_for_one_thread():
    model, x = batchnorm_ext.fuse(fusing.ResNet()), torch.randn(2, 3, 16, 16)
    found, expected = {}, step(model, x)
    with everything():
        thread = threading.Thread(target=lambda: found.update(there=_recompute.recomputes()))
        thread.start(), thread.join()
    assert found == {"there": False}

    def work(i):
        found[i] = step(model, x, everything)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i, (name, value) in itertools.product(range(4), expected.items()):
        assert_bitwise(name, found[i][name], value)


def test_backward_in_several_threads():
    """All of them ask for the same output."""
    x = torch.randn(SIZE, requires_grad=True)
    with everything():
        y = BatchNormAct2d(C)(x * 1)
        loss = (y * y.sin()).sum()
    (expected,) = torch.autograd.grad(loss, x, retain_graph=True)
    found = [None] * 4

    def work(i):
        (found[i],) = torch.autograd.grad(loss, x, retain_graph=True)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for gradient in found:
        assert_bitwise("dx", gradient, expected)


# Layers


def make_layered(recompute):
    torch.manual_seed(0)
    return nn.Sequential(
        conv(3, C),
        BatchNormAct2d(C, "relu", recompute=recompute),
        conv(C, C),
        GroupNormAct(2, C, "silu", recompute=recompute),
        nn.Flatten(),
        nn.Linear(C * 256, 3),
    )


def test_layers_that_recompute():
    x = torch.randn(4, 3, 16, 16)
    expected = step(make_layered(False), x)
    for name, value in step(make_layered(True), x).items():
        assert_bitwise(name, value, expected[name])
    plain, layered = make_layered(False), make_layered(True)
    given = [x, *plain.state_dict().values(), *layered.state_dict().values()]
    kept = kept_bytes(lambda: plain(x).sum(), given)
    less = kept_bytes(lambda: layered(x).sum(), given)
    assert round((kept - less) / BYTES, 2) == 2
    assert less == kept_bytes(lambda: plain(x).sum(), given, everything)


def test_output_of_a_layer_that_recomputes():
    x, layer = torch.randn(2, C, 6, 6, requires_grad=True), BatchNormAct2d(C, recompute=True)
    y = layer(x)
    assert isinstance(y, torch.Tensor) and isinstance(y, batchnorm_ext._recompute.RecomputedTensor)
    for result in (y + 1, y.detach(), F.relu(y), y.sum(), torch.cat([y, y]), y.chunk(2)[0], y.data):
        assert type(result) is torch.Tensor
    assert type(layer(x.detach().requires_grad_(False).add(y.detach()))) is not torch.Tensor
    assert type(layer.requires_grad_(False)(x.detach())) is torch.Tensor  # has no gradient
    assert repr(y) and "recompute=True" in repr(layer)
    with pytest.raises(RuntimeError, match="must match the size"):
        y + torch.ones(7)
    copied = copy.deepcopy(layer)
    assert copied.recompute and not copy.deepcopy(BatchNormAct2d(C)).recompute


def test_layers_that_recompute_after_each_other():
    """Their outputs go to other norms, to residuals and to what writes to them."""

    def run(recompute):
        torch.manual_seed(0)
        layers = [BatchNormAct2d(C, "silu", recompute=recompute) for _ in range(3)]
        plain, x = BatchNorm2d(C), torch.randn(SIZE, requires_grad=True)
        y = layers[0](x)
        z = layers[1](plain(y), y)
        w = layers[2](z.sin(), y * z)
        w += 1
        gradients = torch.autograd.grad((w * z.exp()).sum(), [x, plain.weight, layers[0].weight])
        return [w, *gradients]

    for actual, expected in zip(run(True), run(False), strict=True):
        assert_bitwise("result", actual.as_subclass(torch.Tensor), expected)
    first, second = (BatchNormAct2d(C, "silu", recompute=True) for _ in range(2))
    for _ in range(5):  # not only some of the outputs, as by default in recompute_activations
        y = second(first(torch.randn(SIZE, requires_grad=True)))
        assert type(y) is batchnorm_ext._recompute.RecomputedTensor


def test_compiled_layers_that_recompute(fresh_dynamo, caplog):
    _recompute.log_kept_once.cache_clear()
    caplog.set_level(logging.DEBUG, logger="batchnorm_ext")
    x = torch.randn(4, 3, 16, 16)
    expected = step(make_layered(False), x)
    model = make_layered(True)
    torch.compile(model, backend="aot_eager", fullgraph=True)(x).square().mean().backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name])
    assert len(logged(caplog)) == 1 and "in compiled code" in logged(caplog)[0]
