"""Under the compilers: the numbers of eager mode, and statistics updated once per step.

In compiled code a plain batch normalization is PyTorch's own, whose last bits are others.
"""

import copy

import pytest
import torch
from torch import nn

import batchnorm_ext
from support import assert_bitwise

pytestmark = pytest.mark.usefixtures("fresh_dynamo")

# what inductor fuses rounds elsewhere: float32, values of order 1
CLOSE = {"rtol": 1e-4, "atol": 1e-5}
ROUNDED = {torch.float32: CLOSE, torch.bfloat16: {"rtol": 1 / 128, "atol": 1e-5}}  # one unit


def _model(momentum, device):
    torch.manual_seed(1)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        batchnorm_ext.BatchNorm2d(8, momentum=momentum),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(8 * 36, 5),
        batchnorm_ext.BatchNorm1d(5, momentum=momentum, affine=False),
    )
    return model.to(device)


def _train(model, module, steps=3):
    """The losses of a few steps, and where they lead."""
    optimizer = torch.optim.SGD(module.parameters(), lr=0.05)
    generator = torch.Generator().manual_seed(2)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        x = torch.randn(6, 3, 6, 6, generator=generator).to(next(module.parameters()).device)
        loss = model(x).pow(3).mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return torch.stack(losses), module.state_dict()


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_training(backend, momentum, device):
    eager, module = _model(momentum, device), _model(momentum, device)
    compiled = torch.compile(module, fullgraph=True, backend=backend)
    losses, state = _train(compiled, module)
    expected_losses, expected_state = _train(eager, eager)
    torch.testing.assert_close(losses, expected_losses, **CLOSE)
    for name, value in expected_state.items():
        torch.testing.assert_close(state[name], value, **CLOSE, msg=lambda m, n=name: f"{n}: {m}")
    assert module[1].num_batches_tracked.item() == 3
    assert module[5].num_batches_tracked.item() == 3


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_evaluation_in_both_memory_formats(dtype, backend, device):
    module = batchnorm_ext.BatchNorm2d(7).to(device)
    module(torch.randn(4, 7, 5, 5, device=device))
    module.eval()
    compiled = torch.compile(module, fullgraph=True, backend=backend)
    x = torch.randn(2, 7, 5, 6, device=device).to(dtype)
    for memory_format in (torch.contiguous_format, torch.channels_last):
        x = x.to(memory_format=memory_format)
        y = compiled(x)
        assert y.is_contiguous(memory_format=memory_format) and y.dtype == dtype
        torch.testing.assert_close(y, module(x), **ROUNDED[dtype])
    assert module.num_batches_tracked.item() == 1


def test_changing_sizes(device):
    """Dynamic shapes, also of a batch that is transposed in memory."""
    eager, module = (batchnorm_ext.BatchNorm1d(5).to(device) for _ in range(2))
    layers = module, nn.BatchNorm1d(5).to(device)
    options = {"fullgraph": True, "dynamic": True, "backend": "aot_eager"}
    compiled, native = (torch.compile(layer, **options) for layer in layers)
    for batch, length in [(3, 4), (7, 9), (2, 33)]:
        x = torch.randn(batch, length, 5, device=device).transpose(1, 2)
        leaves = [x.clone().requires_grad_() for _ in range(2)]
        y, expected = compiled(leaves[0]), eager(leaves[1])
        assert y.stride() == native(x).stride()
        torch.testing.assert_close(y, expected, **CLOSE)
        y.pow(3).sum().backward()
        expected.pow(3).sum().backward()
        torch.testing.assert_close(leaves[0].grad, leaves[1].grad, **CLOSE)
    for name, value in eager.state_dict().items():
        torch.testing.assert_close(module.state_dict()[name], value, **CLOSE)


def test_autocast(device):
    eager, module = _model(0.1, device), _model(0.1, device)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    x = torch.randn(6, 3, 6, 6, device=device)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        y, expected = compiled(x), eager(x)
    assert y.dtype == expected.dtype
    torch.testing.assert_close(y, expected, **CLOSE)
    assert module[1].running_var.dtype == torch.float32
    torch.testing.assert_close(module[1].running_var, eager[1].running_var, **CLOSE)


def test_transform_inside(device):
    """The native function is used inside the graph; saying so in the log must not break it."""
    module = batchnorm_ext.BatchNorm2d(3).eval().to(device)

    def gradient(x):
        return torch.func.grad(lambda x: module(x).pow(2).sum())(x)

    x = torch.randn(2, 3, 4, 4, device=device)
    compiled = torch.compile(gradient, fullgraph=True, backend="aot_eager")
    assert_bitwise("dx", compiled(x), gradient(x))


def test_export_in_evaluation(device):
    model = _model(0.1, device)
    model(torch.randn(6, 3, 6, 6, device=device))
    x = torch.randn(6, 3, 6, 6, device=device)
    program = torch.export.export(model.eval(), (x,))
    assert not program.graph_signature.buffers_to_mutate
    torch.testing.assert_close(program.module()(x), model(x), **CLOSE)  # by PyTorch's function


@pytest.mark.parametrize("momentum", [0.1, None])
def test_export_in_training(momentum, device):
    model = batchnorm_ext.BatchNorm2d(3, momentum=momentum).to(device)
    twin = copy.deepcopy(model)
    x = torch.randn(4, 3, 5, 5, device=device)
    exported = torch.export.export(model, (x,))
    mutated = exported.run_decompositions({}).graph_signature.buffers_to_mutate
    assert set(mutated.values()) == {"running_mean", "running_var", "num_batches_tracked"}
    assert model.num_batches_tracked.item() == 0, "exporting ran the model"
    module = exported.module()
    for _ in range(2):
        torch.testing.assert_close(module(x), twin(x), **CLOSE)
    for name, value in twin.named_buffers():
        torch.testing.assert_close(module.get_buffer(name), value, **CLOSE)
