"""Where this library does something else than native PyTorch on purpose."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest


@dataclass
class Difference:
    """One reason, and what differs: path into the outcome -> (native's, ours).

    Of a text the beginning is given, of a number a few digits.
    """

    reason: str
    values: dict[str, tuple]
    later: dict[str, tuple] | None = None  # in later versions of PyTorch

    def explains(self, found: dict[str, tuple]) -> bool:
        return any(_are(found, stated) for stated in (self.values, self.later or self.values))


def _are(found: dict[str, tuple], values: dict[str, tuple]) -> bool:
    return found.keys() == values.keys() and all(
        _agrees(actual, stated)
        for path, pair in values.items()
        for actual, stated in zip(found[path], pair, strict=True)
    )


def _agrees(actual: object, stated: object) -> bool:
    if isinstance(stated, str) and isinstance(actual, str):
        return actual.startswith(stated)
    if isinstance(stated, float | list) and "[" not in str(stated)[1:]:
        return actual == pytest.approx(stated, rel=1e-3, nan_ok=True)
    return actual == stated


RESULT = "a result"  # in place of an error


def is_accepted_mix(pair: tuple) -> bool:
    """Parameters and running statistics may each be in float32 or in the dtype of the input.

    Native wants them all in the dtype of the input, or all in float32 and the input in half.
    """
    native, ours = pair
    texts = ("RuntimeError: mixed dtype (CPU)", "RuntimeError: expected scalar type")
    return ours == RESULT and isinstance(native, str) and native.startswith(texts)


def _memory(*paths: str, native: tuple, ours: tuple) -> Difference:
    return Difference(
        "The output has the memory format of the input, where native makes it contiguous.",
        {f"{path}.stride": (native, ours) for path in paths},
    )


def _checkpoint() -> Difference:
    state = {
        "running_mean": ([-0.27148, 0.033722, 0.37052], [-0.26131, 0.017748, 0.31343]),
        "running_var": ([0.62008, 0.81415, 1.20164], [0.56320, 0.78376, 1.10613]),
        "num_batches_tracked": (2, 1),
    }
    return Difference(
        "A forward that checkpointing repeats does not move the running statistics again.",
        {f"state.{name}.values": pair for name, pair in state.items()},
    )


def _no_channels(*paths: str) -> Difference:
    return Difference(
        "A batch without channels is normalized; native looks for its first one.",
        {path: ("IndexError: select(): index 0 out of range", RESULT) for path in paths},
    )


def _empty(path: str) -> Difference:
    return Difference("An empty batch is not counted.", {path: (1, 0)})


def _own_statistics() -> Difference:
    text = "RuntimeError: one of the variables needed for gradient computation has been modified"
    return Difference(
        "The backward reads statistics of its own, so that the running ones may change before it.",
        {"[0]": (text, RESULT), "[1]": (text, RESULT)},
    )


def _names_its_operator(path: str) -> Difference:
    text = "NotImplementedError: Could not run '{}batch_norm_backward' with arguments from the"
    texts = text.format("aten::native_"), text.format("batchnorm_ext::")
    return Difference("PyTorch names the operator that lacks a kernel.", {path: texts})


def _names_its_view(native: str, ours: str) -> Difference:
    text = (
        "RuntimeError: one of the variables needed for gradient computation has been modified by "
        "an inplace operation: [torch.FloatTensor [{}]], which is output 0 of {}, is at version 1"
    )
    texts = text.format(native, "AsStrided"), text.format(ours, "Add")
    return Difference("PyTorch names the tensor that is saved: natively a view.", {"result": texts})


def _moved_views() -> dict[str, Difference]:
    moved = {
        "running_mean": (0, [0.0, 1, 2, 3, 4, 5], [-0.002688, 0.9351, 1.907, 2.798, 3.775, 4.737]),
        "running_var": (1, [1.0, 2, 3, 4, 5, 6], [1.0485, 1.9490, 3.0334, 3.8485, 4.8721, 6.0712]),
    }
    reason = "Running statistics that are views with the negative bit move; native moves a copy."
    views = ("negated", "imaginary part of a conjugate")
    return {
        f"batch_norm: {name} is a view, {view}": Difference(
            reason,
            {f"(True, {graph})[2][{i}][0].values": (before, after) for graph in (False, True)},
        )
        for name, (i, before, after) in moved.items()
        for view in views
    }


IMAGES = ("[0].y", "[1]")

DIFFERENCES: dict[str, Difference] = {
    **_moved_views(),
    "memory: channels first in memory": _memory(*IMAGES, native=(12, 4, 2, 1), ours=(4, 16, 2, 1)),
    "memory: overlapping windows": _memory(*IMAGES, native=(12, 4, 2, 1), ours=(4, 16, 2, 1)),
    "memory: images transposed": _memory(*IMAGES, native=(12, 4, 2, 1), ours=(12, 4, 1, 2)),
    "memory: samples last in memory": _memory(*IMAGES, native=(12, 4, 2, 1), ours=(1, 16, 8, 4)),
    "memory: ambiguous strides of channels_last": _memory(
        *IMAGES, native=(3, 1, 1, 1), ours=(3, 1, 3, 3)
    ),
    "memory: (N, C) transposed": _memory("y", native=(3, 1), ours=(1, 8)),
    "memory: (N, L, C) transposed": _memory("y", native=(15, 5, 1), ours=(15, 1, 3)),
    "empty batch in training": _empty("state.num_batches_tracked.values"),
    "empty images": _empty("True.state.num_batches_tracked.values"),
    "InstanceNorm2d, tracking: inputs of every size in evaluation": Difference(
        "An empty batch is normalized; native looks for its first sample.",
        {"[6]": ("IndexError: select(): index 0 out of range", RESULT)},
    ),
    "InstanceNorm2d, tracking: fake tensors of every size": Difference(
        "An empty batch is normalized; native looks for its first sample.",
        {"[13]": ("IndexError: select(): index 0 out of range", RESULT)},
    ),
    "InstanceNorm1d: input written to between forward and backward": _names_its_view(
        "1, 24, 5", "4, 6, 5"
    ),
    "InstanceNorm2d: input written to between forward and backward": _names_its_view(
        "1, 24, 3, 2", "4, 6, 3, 2"
    ),
    "InstanceNorm2d, tracking: input written to between forward and backward": _names_its_view(
        "1, 24, 3, 2", "4, 6, 3, 2"
    ),
    "InstanceNorm3d: input written to between forward and backward": _names_its_view(
        "1, 12, 2, 3, 2", "2, 6, 2, 3, 2"
    ),
    "InstanceNorm2d: channels_last": _memory(*IMAGES, native=(36, 6, 2, 1), ours=(36, 1, 12, 6)),
    "InstanceNorm2d, tracking: channels_last": _memory(
        *IMAGES, native=(36, 6, 2, 1), ours=(36, 1, 12, 6)
    ),
    "InstanceNorm3d: channels_last": _memory(
        *IMAGES, native=(72, 12, 6, 2, 1), ours=(72, 1, 36, 12, 6)
    ),
    "RMSNorm: infinity in the input": Difference(
        "A row that holds infinity is NaN; native's finite elements of it are zero.",
        {
            "y.values": ([-0.0], [math.nan]),
            "gradients.weight.values": ([-17.877, math.nan], [math.nan, math.nan]),
        },
    ),
    "no channels": _no_channels("training", "evaluation", "(N, 0)"),
    "no channels, backward": _no_channels("result"),
    "checkpoint, reentrant: result and gradients": _checkpoint(),
    "checkpoint, not reentrant: result and gradients": _checkpoint(),
    "running_mean written to between forward and backward": _own_statistics(),
    "running_var written to between forward and backward": _own_statistics(),
    "running_mean and weight are one tensor": Difference(
        "All arguments are read before the running statistics are written.",
        {
            "[0].values": (
                [0.53779, -1.26644, 1.52904, -0.14117, -0.025255, -0.33569, 0.87012, 0.90506],
                [0.62266, -1.46631, 1.77036, -0.16345, -0.027518, -0.36577, 0.94810, 0.98617],
            )
        },
    ),
    "lazy: first input of one value per channel, then a good one": Difference(
        "A batch that is refused is not counted.", {"[1].state.num_batches_tracked.values": (2, 1)}
    ),
    "third derivative": Difference(
        "Native takes the statistics for constants from the third derivative on, or refuses it.",
        {"[2].values": (-0.33348, 0.0018304)},
        {"result": ("RuntimeError: batch_norm does not support 3rd+ order derivatives.", RESULT)},
    ),
    "sync: a group of one process": Difference(
        "It runs on the CPU.",
        {"[1]": ("ValueError: SyncBatchNorm expected input tensor to be on GPU", RESULT)},
    ),
    "export: a layer with momentum None": Difference(
        "It can be exported, as the counter is read by the operator.",
        {"result": ("GuardOnDataDependentSymNode: Could not extract", RESULT)},
    ),
    "create_graph leaves a gradient that requires one": Difference(
        "The gradient of the bias depends on dy alone, which requires none here.",
        {"[2]": (True, False)},
    ),
    "gradient of another dtype, size or device": _names_its_operator("[4]"),
    "gradient that is sparse, from an operation behind": _names_its_operator("result"),
    "saved tensors: come back of another size": Difference(
        "The backward says which tensors do not fit together.",
        {
            "result": (
                "RuntimeError: Function NativeBatchNormBackward0 returned an invalid gradient",
                "RuntimeError: batch_norm_backward: expected dy like x, Float[2, 3, 2, 2]",
            )
        },
    ),
    "momentum: None with a counter of -1, which divides by zero": Difference(
        "The operator reads the counter on the device, and the average of no batch is infinite.",
        {"result": ("ZeroDivisionError: float division by zero", RESULT)},
    ),
    "jit.script: a function that calls batch_norm": Difference(
        "A constant, that it is scripted, stays in the graph.",
        {"keys": ([f"[{i}]" for i in range(21)], [f"[{i}]" for i in range(22)])},
    ),
    "fx.experimental.optimization.fuse": Difference(
        "A tool that goes by exact types leaves the layer alone: revert the model first.",
        {
            "[0].keys": (
                [f"[0][{i}]" for i in range(4)],
                [f"[0][{i}]" for i in range(5)],
            )
        },
    ),
    "ao.quantization.fuse_modules, in evaluation and for training": Difference(
        "A tool that goes by exact types has no entry for the layer: revert the model first.",
        {"result": (RESULT, "AssertionError: did not find fuser method for")},
    ),
}
