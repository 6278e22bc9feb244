"""SyncBatchNorm inside what trains it: DDP, FSDP2, checkpointing, compilers."""

import copy
from contextlib import nullcontext

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import batchnorm_ext
from support import assert_bitwise

BATCH = 4  # of each rank


def _model(seed=1, norm=batchnorm_ext.SyncBatchNorm):
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(3, 6, 3),
        norm(6),
        nn.ReLU(),
        nn.Conv2d(6, 4, 3),
        norm(4),
        nn.Flatten(),
        nn.Linear(4 * 9, 3),
    )


def _inputs(step):
    """What all ranks get, one batch after the other."""
    generator = torch.Generator().manual_seed(100 + step)
    return torch.randn(BATCH * dist.get_world_size(), 3, 7, 7, generator=generator)


def _own(batch):
    return batch.chunk(dist.get_world_size())[dist.get_rank()]


def _assert_same_training(model, twin, close):
    for name, wanted in twin.state_dict().items():
        actual = model.state_dict()[name]
        actual = actual.full_tensor() if hasattr(actual, "full_tensor") else actual
        torch.testing.assert_close(actual, wanted, **close, msg=lambda m, name=name: f"{name}: {m}")


# float32 through two normalizations and three steps of optimization
CLOSE = {"rtol": 1e-4, "atol": 1e-5}


class Unused(nn.Module):
    """A branch that takes no part in the loss."""

    def __init__(self, model):
        super().__init__()
        torch.manual_seed(3)
        self.model, self.unused = model, nn.Linear(3, 3)

    def forward(self, x):
        return self.model(x)


def train_ddp(mode):
    """Against one process with plain BatchNorm on the whole batch."""
    twin = _model(norm=batchnorm_ext.BatchNorm2d)
    model = _model()
    kwargs = {}
    if mode == "find_unused_parameters":
        model, twin = Unused(model), Unused(twin)
        kwargs["find_unused_parameters"] = True
    ddp = DistributedDataParallel(model, **kwargs)
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.1) for m in (model, twin)]
    for step in range(3):
        for optimizer in optimizers:
            optimizer.zero_grad()
        for module, part in ((ddp, _own), (twin, lambda x: x)):
            first, second = part(_inputs(2 * step)), part(_inputs(2 * step + 1))
            if mode == "two forwards":
                (module(first).pow(2).mean() + module(second).pow(3).mean()).backward()
            elif mode == "no_sync":
                with module.no_sync() if module is ddp else nullcontext():
                    module(first).pow(2).mean().backward()
                module(second).pow(2).mean().backward()
            else:
                module(first).pow(2).mean().backward()
        for optimizer in optimizers:
            optimizer.step()
    _assert_same_training(model, twin, CLOSE)


@pytest.mark.parametrize("mode", ["plain", "two forwards", "no_sync", "find_unused_parameters"])
def test_ddp(mode, ranks):
    ranks(2).run(train_ddp, mode)


def train_fsdp(policy):
    """Sharded over all ranks, against one process on the whole batch in the same precision."""
    twin, model = _model(norm=batchnorm_ext.BatchNorm2d), _model()
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    low = policy is not None
    mixed = {"mp_policy": MixedPrecisionPolicy(policy, torch.float32)} if low else {}
    for layer in model:
        if isinstance(layer, nn.Conv2d | batchnorm_ext.SyncBatchNorm | nn.Linear):
            fully_shard(layer, mesh=mesh, **mixed)
    fully_shard(model, mesh=mesh, **mixed)
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.1) for m in (model, twin)]
    for step in range(3):
        batch = _inputs(step)
        for optimizer in optimizers:
            optimizer.zero_grad()
        model(_own(batch)).pow(2).mean().backward()
        if low:  # the same arithmetic on parameters in low precision
            cast = {n: p.to(policy) for n, p in twin.named_parameters()}
            batch = batch.to(policy)
            torch.func.functional_call(twin, cast, batch).pow(2).mean().backward()
        else:
            twin(batch).pow(2).mean().backward()
        for optimizer in optimizers:
            optimizer.step()
    # bfloat16 rounds every activation and gradient to 4e-3
    _assert_same_training(model, twin, {"rtol": 2e-2, "atol": 2e-2} if low else CLOSE)
    assert model[1].running_var.dtype == torch.float32


@pytest.mark.parametrize("policy", [None, torch.bfloat16])
def test_fsdp(policy, ranks):
    ranks(2).run(train_fsdp, policy)


def train_checkpointed(use_reentrant):
    """As without it, and the statistics count each batch once, also in one process."""
    groups = [None, *(dist.new_group([rank]) for rank in range(dist.get_world_size()))]
    alone = next(g for g in groups[1:] if isinstance(g, dist.ProcessGroup))
    for group in (None, alone):
        layer = batchnorm_ext.SyncBatchNorm(3)
        model = nn.Sequential(nn.Conv2d(3, 3, 3), layer, nn.ReLU())
        twin = copy.deepcopy(model)
        twin[1].process_group = layer.process_group = group
        for step in range(2):
            x, own = _own(_inputs(step)).requires_grad_(), _own(_inputs(step)).requires_grad_()
            # twice, backward in the order of the forwards: each has its own statistics
            losses = [
                checkpoint(model, part, use_reentrant=use_reentrant).pow(2).mean()
                for part in (x, 2 * x)
            ]
            wanted = [twin(part).pow(2).mean() for part in (own, 2 * own)]
            for loss in (*losses, *wanted):
                loss.backward()
            assert_bitwise("dx", x.grad, own.grad)
        for (name, actual), expected in zip(
            model.named_parameters(), twin.parameters(), strict=True
        ):
            assert_bitwise(name, actual.grad, expected.grad)
        for (name, actual), expected in zip(model.named_buffers(), twin.buffers(), strict=True):
            assert_bitwise(name, actual, expected)
        assert layer.num_batches_tracked == 4
    dist.destroy_process_group(alone)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpointing(use_reentrant, ranks):
    ranks(2).run(train_checkpointed, use_reentrant)


def train_compiled(backend, dynamic, wrap):
    """As in eager mode, also with batches of changing sizes."""
    torch._dynamo.reset()
    eager, module = _model(), _model()
    whole = [eager, module]
    if wrap:
        whole = [DistributedDataParallel(m) for m in whole]
    compiled = torch.compile(whole[1], fullgraph=not wrap, backend=backend, dynamic=dynamic)
    for step in range(3):
        x = _own(_inputs(step))[: BATCH - (step if dynamic else 0)]
        results = []
        for model in (whole[0], compiled):
            y = model(x)
            y.pow(2).mean().backward()
            results.append(y)
        torch.testing.assert_close(*results, **CLOSE)
    for a, b in zip(eager.parameters(), module.parameters(), strict=True):
        torch.testing.assert_close(b.grad, a.grad, **CLOSE)
    _assert_same_training(module, eager, CLOSE)
    torch._dynamo.reset()


@pytest.mark.parametrize(
    "backend, dynamic, wrap",
    [
        ("aot_eager", False, False),
        ("aot_eager", True, False),
        ("aot_eager", False, True),
        ("inductor", False, False),
    ],
)
def test_compile(backend, dynamic, wrap, ranks):
    ranks(2).run(train_compiled, backend, dynamic, wrap)


def export():
    model, twin = _model(), _model()
    x = _own(_inputs(0))
    exported = torch.export.export(model, (x,))
    mutated = exported.run_decompositions({}).graph_signature.buffers_to_mutate
    tracked = ["running_mean", "running_var", "num_batches_tracked"]
    assert set(mutated.values()) == {f"{n}.{name}" for n in (1, 4) for name in tracked}
    module = exported.module()
    for step in range(2):
        assert_bitwise("y", module(_own(_inputs(step))), twin(_own(_inputs(step))))
    for name, value in twin.named_buffers():
        assert_bitwise(name, module.get_buffer(name), value)
    program = torch.export.export(model.eval(), (x,))
    assert not program.graph_signature.buffers_to_mutate
    assert not any("all_reduce" in str(node.target) for node in program.graph.nodes)


def test_export(ranks):
    ranks(2).run(export)


def train_autocast():
    """Half-precision parameters are raised, inputs stay: as the local layer does."""
    layer, twin = (kind(3).bfloat16() for kind in (batchnorm_ext.SyncBatchNorm, nn.BatchNorm2d))
    for norm in (layer, twin):
        norm.running_mean, norm.running_var = norm.running_mean.float(), norm.running_var.float()
    whole = _inputs(0).bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, wanted = layer(_own(whole)), batchnorm_ext.convert(twin)(whole)
    assert y.dtype == torch.bfloat16
    # a few roundings of float32, seldom enough to end in the next bfloat16
    torch.testing.assert_close(y, _own(wanted), rtol=2**-7, atol=1e-5)
    torch.testing.assert_close(layer.running_var, twin.running_var)


def test_autocast(ranks):
    ranks(2).run(train_autocast)
