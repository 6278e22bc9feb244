"""SyncBatchNormAct: norm, residual and activation on all ranks are those of one whole batch."""

import copy
import logging

import pytest
import torch
import torch.distributed as dist
from torch import nn

import batchnorm_ext
from activations import ACTIVATIONS, PIECEWISE, C, bound, gradients, make_problem, oracle
from batchnorm_ext import _recompute
from support import assert_bitwise, assert_within
from sync_problems import naming
from test_sync_messages import assert_unchanged, counting_group, error, state

SPLITS = [(4,), (2, 2), (3, 1), (0, 3), (1, 4, 2), (3, 0, 2)]
INPUTS = [((), "contiguous"), ((9, 7), "contiguous"), ((9, 7), "channels_last")]


def layer_of(p, activation, kind=batchnorm_ext.SyncBatchNormAct, **options):
    """With the parameters of a problem, which every rank makes from the same seed, and which from
    now on has those of the layer."""
    layer = kind(C, activation, dtype=p.weight.dtype, **options)
    with torch.no_grad():
        layer.weight.copy_(p.weight)
        layer.bias.copy_(p.bias)
    p.weight, p.bias = layer.weight, layer.bias
    return layer


def own(tensor, split, requires_grad=False):
    """What this rank has of a whole."""
    if tensor is None:
        return None
    return tensor.detach().split(split)[dist.get_rank()].requires_grad_(requires_grad)


def over_ranks(value):
    total = value.double()
    dist.all_reduce(total)
    return total


def step(layer, p, split):
    """The output of this rank, and its gradients; those of parameters added up over ranks."""
    x, residual = (own(t, split, True) for t in (p.x, p.residual))
    y = layer(x) if residual is None else layer(x, residual)
    y.backward(own(p.dy, split))
    found = {"x": x.grad, "weight": over_ranks(layer.weight.grad)}
    found["bias"] = over_ranks(layer.bias.grad)
    if residual is not None:
        found["residual"] = residual.grad
    return y, found


def compare_with_oracle(split, dtype, activations):
    for activation in activations:
        for size, layout in INPUTS:
            for has_residual in (False, True):
                if has_residual and "(-" in activation:
                    continue  # PyTorch's function, after the norm
                with naming(activation, size, layout, has_residual):
                    p = make_problem((sum(split), C, *size), layout, dtype, has_residual)
                    compare_one(p, split, dtype, activation)


def compare_one(p, split, dtype, activation):
    y, found = step(layer_of(p, activation), p, split)
    assert y.dtype == dtype and y.stride() == torch.empty_like(own(p.x, split)).stride()
    exact = p.double()
    value = oracle(exact, "batch, training", activation, None)
    assert_within("y", y, own(value, split), own(bound(value, dtype, 1.0), split))
    # a piecewise linear one after a residual looks at its output, which is rounded
    rounds = p.residual is not None and activation in PIECEWISE
    expected = oracle(exact, "batch, training", activation, dtype if rounds else None)
    wanted = gradients(expected, exact)
    for name, value in found.items():
        whole = wanted[f"gradient of {name}"]
        part = own(whole, split) if name in ("x", "residual") else whole
        rounded_to = value.dtype if name in ("x", "residual") else p.weight.dtype
        assert_within(f"d{name}", value, part, bound(whole, rounded_to, 1.0).max())


@pytest.mark.parametrize("split", SPLITS, ids=str)
def test_ranks_are_one_batch(split, ranks):
    ranks(len(split)).run(compare_with_oracle, split, torch.float32, list(ACTIVATIONS))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("split", [(3, 1), (1, 4, 2)], ids=str)
def test_dtypes(split, dtype, ranks):
    some = ["identity", "relu", "leaky_relu(-0.5)", "hardtanh(-0.5, 1.25)", "silu", "gelu"]
    ranks(len(split)).run(compare_with_oracle, split, dtype, some)


def compare_with_local_layer(split):
    """To the last bits of the statistics, whose sums are another order of additions."""
    for activation in ("relu", "leaky_relu(0.25)", "leaky_relu(-0.5)", "gelu"):
        for size, kind in (((), "1d"), ((9, 7), "2d"), ((2, 3, 5), "3d")):
            for has_residual in (False, True):
                p = make_problem((sum(split), C, *size), "contiguous", torch.float32, has_residual)
                local = layer_of(p, activation, getattr(batchnorm_ext, f"BatchNormAct{kind}"))
                layer = batchnorm_ext.convert_sync_batchnorm(copy.deepcopy(local))
                y, found = step(layer, p, split)
                expected = local(*(t for t in (p.x, p.residual) if t is not None))
                wanted = gradients(expected, p)
                close = {"rtol": 2e-6, "atol": 2e-6}
                torch.testing.assert_close(y, own(expected, split), **close)
                for name, value in found.items():
                    whole = wanted[f"gradient of {name}"]
                    part = own(whole, split) if name in ("x", "residual") else whole.double()
                    torch.testing.assert_close(value, part, rtol=1e-5, atol=1e-5)
                for name, buffer in local.named_buffers():
                    torch.testing.assert_close(layer.get_buffer(name), buffer, **close)
                inputs = [own(t, split) for t in (p.x, p.residual) if t is not None]
                assert_bitwise("evaluation", layer.eval()(*inputs), reverted(layer)(*inputs))


def reverted(layer):
    return batchnorm_ext.revert(copy.deepcopy(layer))


@pytest.mark.parametrize("split", [(3,), (2, 2), (3, 0, 2)], ids=str)
def test_equals_the_local_layer(split, ranks):
    ranks(len(split)).run(compare_with_local_layer, split)


# Messages


def count_messages():
    group = counting_group([0, 1])
    forward, backward = (4 * C + 1, torch.float64), (2 * C, torch.float64)

    def expect(*messages):
        assert group.messages == [*messages]
        group.messages.clear()

    for activation in ("relu", "silu", "identity"):
        for has_residual in (False, True):
            p = make_problem((4, C, 5), "contiguous", torch.float32, has_residual)
            layer = layer_of(p, activation, process_group=group)
            inputs = [t for t in (p.x, p.residual) if t is not None]
            y = layer(*inputs)
            expect(forward)
            wanted = gradients(y, p)
            expect(backward)
            if not has_residual:
                continue
            # of the residual and the parameters alone: those of this rank, without a message
            leaves = [p.residual, layer.weight, layer.bias]
            found = torch.autograd.grad(layer(p.x.detach(), p.residual), leaves, p.dy)
            expect(forward)
            torch.testing.assert_close(found[0], wanted["gradient of residual"])
            layer.eval()(*inputs).sum().backward()
            expect()


def test_one_message_forward_and_one_backward(ranks):
    ranks(2).run(count_messages)


def save_for_backward():
    """The input, the parameters, the statistics, the count, and the residual or the output."""
    for activation in ACTIVATIONS:
        for has_residual in (False, True):
            if (has_residual, activation) == (True, "leaky_relu(-0.5)"):
                continue  # PyTorch's function, after the norm
            p = make_problem((2, C, 5, 3), "contiguous", torch.float32, has_residual)
            layer, saved = layer_of(p, activation), []
            with torch.autograd.graph.saved_tensors_hooks(saved.append, lambda t: t):
                y = layer(*(t for t in (p.x, p.residual) if t is not None))
            assert y.grad_fn.name() == "batchnorm_ext::Norm"
            large = {t.data_ptr() for t in saved if t.numel() == p.x.numel()}
            kept = {p.x.data_ptr()}
            if has_residual and activation != "identity":
                kept.add((y if activation in PIECEWISE else p.residual).data_ptr())
            assert large == kept
            assert sum(t.nbytes for t in saved if t.numel() != p.x.numel()) <= C * (8 + 16) + 8


def test_nothing_is_saved_that_a_network_would_not_keep(ranks):
    ranks(2).run(save_for_backward)


def keep_outputs():
    _recompute.log_kept_once.cache_clear()
    records = []
    handler = logging.Handler()
    handler.emit = lambda record: records.append(record.getMessage())
    logger = logging.getLogger("batchnorm_ext")
    logger.addHandler(handler)
    logger.setLevel(logging.DEBUG)
    try:
        p = make_problem((4, C, 5), "contiguous", torch.float32, True)
        layers = [layer_of(p, "silu", recompute=recompute) for recompute in (True, False)]
        y, expected = (layer(p.x, p.residual) for layer in layers)
    finally:
        logger.removeHandler(handler)
        logger.setLevel(logging.NOTSET)
    said = "recompute_activations has no effect on outputs of SyncBatchNorm over several ranks"
    assert records.count(said) == 1
    assert type(y) is torch.Tensor
    assert_bitwise("y", y, expected)


def test_recompute_says_that_it_keeps_the_output(ranks):
    ranks(2).run(keep_outputs)


def compile_in_one_graph():
    torch._dynamo.reset()
    for activation in ("relu", "silu"):
        p = make_problem((4, C, 5), "contiguous", torch.float32, True)
        layer = layer_of(p, activation)
        twin = copy.deepcopy(layer)
        compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
        y, expected = compiled(p.x, p.residual), twin(p.x, p.residual)
        assert_bitwise("y", y, expected)
        leaves = p.x, p.residual
        wanted = torch.autograd.grad(expected, (*leaves, *twin.parameters()), p.dy)
        found = torch.autograd.grad(y, (*leaves, *layer.parameters()), p.dy)
        for a, b in zip(found, wanted, strict=True):
            assert_bitwise("gradient", a, b)
        for name, buffer in twin.named_buffers():
            assert_bitwise(name, layer.get_buffer(name), buffer)
    torch._dynamo.reset()


def test_compiled_in_one_graph(ranks):
    ranks(2).run(compile_in_one_graph)


def refuse():
    """Before any message: the other ranks are not left waiting."""
    group = counting_group([0, 1])
    layer = batchnorm_ext.SyncBatchNormAct(C, process_group=group)
    layer._batchnorm_ext_name = "head"
    before, x = state(layer), torch.randn(4, C, 3)
    with error("residual of the shape of input, (4, 8, 3), got shape (4, 8, 1)", kind=ValueError):
        layer(x, x[..., :1])
    with error("dtype of input", kind=ValueError):
        layer(x, x.double())
    with error("expected residual to be a tensor or None, got 1.0", kind=TypeError):
        layer(x, 1.0)
    with error("head", "(4, 5, 3)", "5"):
        layer(x[:, :5], x[:, :5])
    arguments = (layer.weight, None, *(None,) * 3, 0.1, 1e-5, group.group_name, "head")
    op = torch.ops.batchnorm_ext.sync_batch_norm
    with error("head", "expected activation to be one of relu", "'swish'", kind=ValueError):
        op(x, *arguments, activation="swish")
    with error("head", "expected residual like input", "[4, 8, 1]"):
        op(x, *arguments, residual=x[..., :1], activation="relu")
    with error("head", "negative slope", kind=NotImplementedError):
        op(x, *arguments, residual=x, activation="leaky_relu(-0.5)")
    assert not group.messages
    assert_unchanged(layer, before)


def test_bad_arguments(ranks):
    ranks(2).run(refuse)


def join_model():
    """Layers of both kinds in DistributedDataParallel follow one process."""
    torch.manual_seed(1)
    model = nn.Sequential(nn.Conv2d(3, C, 3), batchnorm_ext.BatchNormAct2d(C, "silu"), nn.Flatten())
    model = nn.Sequential(*model, nn.Linear(C * 9, 3)).double()
    alone = copy.deepcopy(model)
    batch = torch.randn(4, 3, 5, 5, dtype=torch.float64)
    model = batchnorm_ext.convert_sync_batchnorm(model)
    model = nn.parallel.DistributedDataParallel(model)
    model(batch.chunk(2)[dist.get_rank()]).pow(2).mean().backward()
    alone(batch).pow(2).mean().backward()
    for found, wanted in zip(model.module.parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(found.grad, wanted.grad, rtol=1e-12, atol=1e-12)


def test_data_parallel_training(ranks):
    ranks(2).run(join_model)
