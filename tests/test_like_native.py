"""Every situation has the outcome it has with native PyTorch: results, errors, state, warnings."""

import functools

import pytest
import torch

import batchnorm_ext
from situations import DIFFERENCES, SITUATIONS
from situations.differences import is_accepted_mix
from situations.harness import NATIVE, OURS, Outcome, differences, observe
from situations.parts import FLOATS

pytestmark = pytest.mark.only("cpu", reason="the texts and dtypes are those of native CPU kernels")

PAIRS = [
    pytest.param(case, how, id=f"{case.name}-{how}")
    for case in SITUATIONS.values()
    for how in OURS
    if how == "built" or not case.of_classes
]


@functools.cache
def _native(name: str) -> Outcome:
    return observe(SITUATIONS[name], NATIVE)


@pytest.mark.parametrize("case, how", PAIRS)
def test_like_native(case, how):
    found = differences(_native(case.name), observe(case, OURS[how]), case.scale)
    found = {path: pair for path, pair in found.items() if not is_accepted_mix(pair)}
    if case.name in DIFFERENCES:
        assert DIFFERENCES[case.name].explains(found), f"{DIFFERENCES[case.name]}\n{_listed(found)}"
    else:
        assert not found, _listed(found)


def _listed(found: dict[str, tuple]) -> str:
    return "\n" + "\n".join(
        f"{path}\n    native: {native}\n    ours:   {ours}"
        for path, (native, ours) in found.items()
    )


def test_differences_are_of_situations_that_exist():
    assert DIFFERENCES.keys() <= SITUATIONS.keys()
    assert len(SITUATIONS) >= 400


def test_native_counts_a_batch_that_it_refuses():
    """Ours leaves all state as it was, which every situation asserts that fails."""
    refused = _native("one value per channel in training").result
    assert [raised.changed for raised in refused] == [["num_batches_tracked"]] * 6 + [[]]


@pytest.mark.parametrize("argument", ["running_mean", "running_var", "weight", "bias"])
@pytest.mark.parametrize("training", [True, False])
def test_mixes_of_dtypes_that_are_accepted(argument, training):
    def accepts(input_dtype, dtype):
        tensors = {"running_mean": torch.zeros(3), "running_var": torch.ones(3)}
        tensors[argument] = torch.ones(3, dtype=dtype)
        x = torch.randn(4, 3).to(input_dtype)
        try:
            batchnorm_ext.functional.batch_norm(x, **tensors, training=training)
        except RuntimeError:
            return False
        return True

    for input_dtype in FLOATS:
        accepted = {dtype for dtype in FLOATS if accepts(input_dtype, dtype)}
        assert accepted == {torch.float32, input_dtype}
