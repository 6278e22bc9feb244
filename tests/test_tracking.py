"""Which forwards move the running statistics, and what may be written where."""

from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest
import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

import batchnorm_ext
from batchnorm_ext import _tracking
from support import assert_bitwise, batch_norm, ops


def _layer(device, **options):
    return batchnorm_ext.BatchNorm2d(3, **options).to(device)


def _state(layer):
    return {name: buffer.clone() for name, buffer in layer.named_buffers()}


def _assert_state(layer, expected):
    for name, buffer in layer.named_buffers():
        assert_bitwise(name, buffer, expected[name])


@pytest.mark.parametrize("last", [True, False], ids=["last in its block", "inside its block"])
@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_repeated_forward_is_not_tracked_again(use_reentrant, momentum, last, device):
    once, layer = _layer(device, momentum=momentum), _layer(device, momentum=momentum)
    block = nn.Sequential(layer, *[nn.Conv2d(3, 3, 1), nn.Tanh()] * (not last)).to(device)
    # two micro-batches, both forwards before the backwards
    batches = [torch.randn(4, 3, 5, 5, device=device, requires_grad=True) for _ in range(2)]
    losses = [checkpoint(block, x, use_reentrant=use_reentrant).pow(2).sum() for x in batches]
    for loss in losses:
        loss.backward()
    for x in batches:
        once(x)
    assert layer.num_batches_tracked == 2
    _assert_state(layer, _state(once))


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_more_forwards_than_were_remembered(use_reentrant, device):
    """Of 100 before one backward, 36 were tracked twice."""
    layer = _layer(device)
    batches = [torch.randn(4, 3, 2, 2, device=device, requires_grad=True) for _ in range(100)]
    losses = [checkpoint(layer, x, use_reentrant=use_reentrant).pow(2).sum() for x in batches]
    sum(losses).backward()
    assert layer.num_batches_tracked == 100


def test_threads_that_checkpoint_one_layer(device):
    """What one thread had tracked was undone by another's repetition."""
    layer = _layer(device)

    def work(seed):
        generator = torch.Generator(device).manual_seed(seed)
        for _ in range(40):
            x = torch.randn(4, 3, 8, 8, device=device, generator=generator).requires_grad_()
            checkpoint(layer, x, use_reentrant=False).sum().backward()

    with ThreadPoolExecutor(3) as pool:
        list(pool.map(work, range(3)))
    assert layer.num_batches_tracked == 120


@pytest.mark.parametrize("policy", list(CheckpointPolicy)[:4], ids=str)
def test_selective_checkpointing(policy, device):
    """Its dispatch mode met a clone in the backward that it had not seen in the forward."""
    once, layer = _layer(device), _layer(device)
    x = torch.randn(4, 3, 2, 2, device=device, requires_grad=True)
    contexts = partial(
        create_selective_checkpoint_contexts,
        lambda context, op, *args, **kwargs: (
            policy if op is torch.ops.aten.tanh.default else CheckpointPolicy.PREFER_RECOMPUTE
        ),
    )
    block = nn.Sequential(nn.Tanh(), layer, nn.Tanh())
    checkpoint(block, x, use_reentrant=False, context_fn=contexts).sum().backward()
    once(x.tanh())
    _assert_state(layer, _state(once))


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("momentum", [0.1, None])
def test_repeated_forward_with_a_counter_of_another_dtype(momentum, use_reentrant, device):
    """The counter was raised twice, as averaging of models leaves it: in float32."""
    once, layer = _layer(device, momentum=momentum), _layer(device, momentum=momentum)
    for module in (once, layer):
        module.num_batches_tracked = module.num_batches_tracked.float()
    block = nn.Sequential(layer, nn.Tanh())
    for _ in range(2):
        x = torch.randn(4, 3, 2, 2, device=device, requires_grad=True)
        checkpoint(block, x, use_reentrant=use_reentrant).sum().backward()
        once(x)
    assert layer.num_batches_tracked == 2
    _assert_state(layer, _state(once))


def test_channels_that_are_alike_have_fingerprints_of_their_own():
    """A sum of bits modulo 2 is zero for any statistics that come in pairs."""
    stats = torch.randn(2, 1, dtype=torch.float64).expand(2, 4).contiguous()
    several = torch.stack([stats, 2 * stats, stats + 1, stats.flip(0)])
    prints = _tracking._fingerprints(several).tolist()
    assert len(set(prints)) == 4 and 0 not in prints


def test_last_batches_are_remembered_whatever_their_sizes(monkeypatch):
    """As those of instance normalization, where each sample has statistics."""
    monkeypatch.setattr(_tracking, "_MOST", 128)
    history = _tracking._History(torch.device("cpu"))
    batches = [torch.randn(2, 3 + i // 100, dtype=torch.float64) for i in range(300)]
    for stats in batches:
        history.add(stats)
    assert [history.has(stats).item() for stats in batches] == [False] * 172 + [True] * 128


class Revisited(torch.autograd.Function):
    """A block that is run again in the backward, as in a reversible network."""

    @staticmethod
    def forward(ctx, x, block, in_forward, in_backward):
        ctx.block, ctx.tracks = block, in_backward
        ctx.save_for_backward(x)
        block.track_running_stats = in_forward
        return block(x)

    @staticmethod
    def backward(ctx, dy):
        (x,) = ctx.saved_tensors
        ctx.block.track_running_stats = ctx.tracks
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            (dx,) = torch.autograd.grad(ctx.block(x), x, dy)
        return dx, None, None, None


@pytest.mark.parametrize("tracked_in", ["forward", "backward", "both"])
def test_tracking_that_users_arrange(tracked_in, device):
    """The batch is tracked once, in whichever of the two forwards they let it."""
    once, layer = _layer(device), _layer(device)
    x = torch.randn(4, 3, 5, 5, device=device, requires_grad=True)
    flags = tracked_in != "backward", tracked_in != "forward"
    Revisited.apply(x, layer, *flags).sum().backward()
    once(x)
    _assert_state(layer, _state(once))


def test_another_batch_within_a_backward_is_tracked(device):
    once, layer = _layer(device), _layer(device)
    first, second = (torch.randn(4, 3, 5, 5, device=device, requires_grad=True) for _ in range(2))
    y = checkpoint(layer, first, use_reentrant=False)

    def look_at_another(_):
        layer(second.detach())

    first.register_hook(look_at_another)
    y.pow(2).sum().backward()
    once(first), once(second)
    _assert_state(layer, _state(once))


def test_compiled_evaluation_writes_nothing(device, fresh_dynamo):
    """Its schema has no aliases: the versions stay, and a loss may read the statistics."""
    layer = _layer(device).eval()
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    scale = torch.ones(3, device=device, requires_grad=True)
    loss = (scale * layer.running_mean).sum() + (scale * layer.running_var).sum()
    versions = [buffer._version for buffer in layer.buffers()]
    compiled(torch.randn(2, 3, 4, 4, device=device)).sum().backward()
    assert [buffer._version for buffer in layer.buffers()] == versions
    loss.backward()
    assert_bitwise("gradient", scale.grad, torch.ones_like(scale))


@pytest.mark.parametrize("kind", ["expanded mean", "expanded variance", "one for both"])
def test_statistics_that_share_memory_are_refused(kind, device):
    x = torch.randn(4, 3, 5, device=device)
    mean, var = torch.zeros(3, device=device), torch.ones(3, device=device)
    if kind == "expanded mean":
        mean = torch.zeros(1, device=device).expand(3)
    elif kind == "expanded variance":
        var = torch.ones(1, device=device).expand(3)
    else:
        mean = var
    before = mean.clone(), var.clone()
    for function in (
        lambda: batch_norm(x, None, None, mean, var, None, True, 0.1, 1e-5),
        lambda: batchnorm_ext.functional.batch_norm(x, mean, var, training=True),
    ):
        with pytest.raises(RuntimeError, match="single memory location"):
            function()
    assert_bitwise("mean", mean, before[0])
    assert_bitwise("var", var, before[1])


@pytest.mark.parametrize("training", [True, False])
def test_gradients_have_the_dtype_of_their_own_parameter(training, device):
    """70,000 is more than float16 holds, and the bias is in float32."""
    x = torch.randn(70_000, 2, device=device, dtype=torch.float16)
    weight = torch.ones(2, device=device, dtype=torch.float16, requires_grad=True)
    bias = torch.zeros(2, device=device, requires_grad=True)
    mean, var = torch.zeros(2, device=device), torch.ones(2, device=device)
    y = batchnorm_ext.functional.batch_norm(x, mean, var, weight, bias, training)
    y.backward(torch.ones_like(y))
    assert weight.grad.dtype is torch.float16
    assert_bitwise("dbias", bias.grad, torch.full_like(bias, 70_000))
    with torch.device("meta"):
        x, dy, weight = torch.empty(4, 2).half(), torch.empty(4, 2).half(), torch.ones(2).half()
        stats = torch.empty(2, 2, dtype=torch.float64)
    _, dweight, dbias = ops.batch_norm_backward(
        dy, x, weight, stats, training, [True] * 3, torch.float32
    )
    assert (dweight.dtype, dbias.dtype) == (torch.float16, torch.float32)


class Hook:
    """Raises at a tensor that autograd saves, the first or a later one."""

    def __init__(self, error, at):
        self.error, self.at, self.seen = error, at, 0

    def __call__(self, tensor):
        self.seen += 1
        if self.seen == self.at:
            raise self.error
        return tensor


@pytest.mark.parametrize("at", [1, 3], ids=["first tensor", "last tensor"])
@pytest.mark.parametrize(
    "error",
    [KeyError("stop"), NotImplementedError("stop"), RuntimeError("Expected a value of type")],
)
def test_hook_that_raises_moves_no_statistics(error, at, device):
    """Nor is NotImplementedError a refusal, after which native would track the batch again."""
    layer = _layer(device)
    x = (torch.randn(4, 3, 2, 2, device=device) + 5).requires_grad_()
    before, versions = _state(layer), [buffer._version for buffer in layer.buffers()]
    hook = Hook(error, at)
    with pytest.raises(type(error)) as raised, saved_tensors_hooks(hook, lambda t: t):
        layer(x)
    assert str(raised.value) == str(error)
    assert hook.seen == at, "the forward has run twice"
    _assert_state(layer, before)
    assert [buffer._version for buffer in layer.buffers()] == versions


@pytest.mark.parametrize("kind", ["input", "weight"])
def test_inference_tensors_that_autograd_cannot_save_move_no_statistics(kind, device):
    mean, var = torch.zeros(3, device=device), torch.ones(3, device=device)
    x, weight = torch.randn(4, 3, device=device) + 5, torch.ones(3, device=device)
    with torch.inference_mode():
        if kind == "input":
            x, weight = x.clone(), weight.requires_grad_()
        else:
            x, weight = x.requires_grad_(), weight.clone()
    with pytest.raises(RuntimeError, match="Inference tensors cannot be saved for backward"):
        batchnorm_ext.functional.batch_norm(x, mean, var, weight, training=True)
    assert_bitwise("mean", mean, torch.zeros_like(mean))
    assert_bitwise("var", var, torch.ones_like(var))


def test_statistics_of_many_forwards_are_not_kept(device):
    """8 bytes of each in the end; once it was the statistics themselves, 64 KB each."""
    layer = batchnorm_ext.BatchNorm1d(4096).to(device)
    with torch.no_grad():
        for _ in range(100):
            layer(torch.randn(2, 4096, device=device))
    history = _tracking._histories[layer.running_mean]
    assert history.count + len(history.waiting) == 100
    assert sum(stats.nbytes for stats in history.waiting) <= 64 << 10
    history.has(torch.zeros(2, 4096, dtype=torch.float64, device=device))
    assert history.count == 100 and not history.waiting
    assert history.fingerprints.untyped_storage().nbytes() == 128 * 8
