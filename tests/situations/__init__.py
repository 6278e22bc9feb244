"""Uses of the layers that have the outcome they have with native PyTorch.

A new one is a function in one of these files, decorated with ``situation(name)``. It gets a
library, native PyTorch's classes and function or ours, and returns tensors and values, nested at
will, or raises. ``tests/test_like_native.py`` runs all of them on both.
"""

from situations import (  # noqa: F401
    arguments,
    bits,
    buffers,
    copies,
    counters,
    dtypes,
    family,
    family_functions,
    family_uses,
    grad_modes,
    gradients,
    hooks,
    in_place,
    layouts,
    lazy,
    no_data,
    options,
    parameters,
    replaced,
    saved,
    shadowed,
    subclasses,
    sync,
    tools,
    transforms,
)
from situations.differences import DIFFERENCES
from situations.harness import SITUATIONS

__all__ = ["DIFFERENCES", "SITUATIONS"]
