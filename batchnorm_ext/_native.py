"""The functions of PyTorch that this library takes over."""

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["BATCH_NORM", "GROUP_NORM", "INSTANCE_NORM", "Native"]


class Native:
    """A function of ``torch.nn.functional``, as it is now: a program may have replaced it."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._function, self._operator = getattr(F, name), getattr(torch, name)
        self.ours = None  # what a program may put in its place to use this library

    def __call__(self, *arguments) -> Tensor:
        function = getattr(F, self.name)
        return (self._function if function is self.ours else function)(*arguments)

    def is_replaced(self) -> bool:
        function = getattr(F, self.name)
        return (function is not self._function and function is not self.ours) or getattr(
            torch, self.name
        ) is not self._operator


BATCH_NORM, INSTANCE_NORM, GROUP_NORM = map(Native, ("batch_norm", "instance_norm", "group_norm"))
