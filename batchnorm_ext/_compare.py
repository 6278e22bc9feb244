"""A model before and after a change, on the same inputs."""

import copy
from collections.abc import Callable

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn

# Of the largest value: two correct models differ in float64 by roundings, which a deep network in
# training amplifies.
_CLOSE = 1e-6


def compare(model: nn.Module, change: Callable[[nn.Module], None], example_inputs: object) -> None:
    """Raise where outputs, gradients or buffers of two copies, one of them changed, differ."""
    inputs = example_inputs if isinstance(example_inputs, tuple) else (example_inputs,)
    results = []
    for changed in (False, True):
        twin = copy.deepcopy(model).double()
        if changed:
            change(twin)
        results.append(_results(twin, pytree.tree_map(_double, inputs)))
    for kind, expected in results[0].items():
        # a gradient that is zero but for roundings is compared with the largest
        bound = _CLOSE * max(
            (v.abs().max().item() for v in expected.values() if v.numel()), default=0
        )
        for name, value in expected.items():
            found = results[1][kind][name]
            if not torch.allclose(found, value, rtol=0, atol=bound, equal_nan=True):
                error = f"{name} by {(found - value).abs().max().item():.3g}"
                raise RuntimeError(f"the fused model differs on the example inputs: {kind}{error}")


def _results(model: nn.Module, inputs: tuple) -> dict[str, dict[str, Tensor]]:
    """Outputs, gradients of parameters, and buffers."""
    devices = {p.device.index for p in model.parameters() if p.is_cuda}
    with torch.random.fork_rng(list(devices)):
        torch.manual_seed(0)
        outputs = [o for o in pytree.tree_leaves(model(*inputs)) if isinstance(o, Tensor)]
        total = sum(o.cos().sum() for o in outputs if o.is_floating_point())
        if isinstance(total, Tensor) and total.requires_grad:
            total.backward()
    gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    return {
        "output ": {str(place): _numbers(output) for place, output in enumerate(outputs)},
        "gradient of ": {name: _numbers(value) for name, value in gradients.items()},
        "": {name: _numbers(value) for name, value in model.named_buffers()},
    }


def _numbers(value: Tensor) -> Tensor:
    value = value.detach().clone()
    return (torch.view_as_real(value) if value.is_complex() else value).double()


def _double(value: object) -> object:
    if isinstance(value, Tensor):
        value = value.detach().clone()
        return value.double() if value.is_floating_point() else value
    return value
