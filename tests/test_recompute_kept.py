"""What is kept of norms whose outputs are computed again, and for how long."""

import copy
import gc
from contextlib import nullcontext
from functools import partial

import pytest
import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef

import batchnorm_ext
from activations import C
from batchnorm_ext import (
    BatchNorm2d,
    BatchNormAct2d,
    recompute_activations,
)
from benchmarks import networks
from keeping import kept_bytes, saved_bytes
from recomputing import SIZE, assert_same_steps, everything, tensors_kept
from support import assert_bitwise

pytestmark = pytest.mark.usefixtures("no_hooks_are_left")


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
