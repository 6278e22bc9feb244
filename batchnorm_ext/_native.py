"""The functions of PyTorch that this library takes over."""

from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = [
    "BATCH_NORM",
    "GROUP_NORM",
    "INSTANCE_NORM",
    "LAYER_NORM",
    "LAYER_NORM_OF_CHANNELS",
    "RMS_NORM",
    "WEIGHT_NORM",
    "Native",
]


class Native:
    """A function of ``module``, as it is now: a program may have replaced it.

    ``devices``: the types of device that this library has kernels for. ``check``: the function that
    refuses sizes, which is replaced to allow or refuse others.
    """

    def __init__(
        self, name: str, *devices: str, module: ModuleType = F, check: str | None = None
    ) -> None:
        self.name, self.devices, self._module = name, (*devices, "meta"), module
        self._function, self._operator = getattr(module, name), getattr(torch, name)
        self._check_name = check
        self._check = None if check is None else getattr(module, check)
        self.ours = None  # what a program may put in its place to use this library

    def __call__(self, *arguments) -> Tensor:
        function = getattr(self._module, self.name)
        return (self._function if function is self.ours else function)(*arguments)

    def is_replaced(self) -> bool:
        function = getattr(self._module, self.name)
        if function is not self._function and function is not self.ours:
            return True
        if self._check_name and getattr(self._module, self._check_name) is not self._check:
            return True
        return getattr(torch, self.name) is not self._operator


BATCH_NORM = Native("batch_norm", "cpu", "cuda", check="_verify_batch_size")
INSTANCE_NORM = Native("instance_norm", "cpu", "cuda", check="_verify_spatial_size")
GROUP_NORM = Native("group_norm", "cpu", "cuda", check="_verify_batch_size")
LAYER_NORM = Native("layer_norm", "cpu")
LAYER_NORM_OF_CHANNELS = Native("layer_norm", "cpu", "cuda")
RMS_NORM = Native("rms_norm", "cpu")
WEIGHT_NORM = Native("_weight_norm", "cpu", module=torch)
