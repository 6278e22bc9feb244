"""Outputs, statistics and running statistics against the oracle, over the table of cases."""

import pytest
import torch

import batchnorm_ext.functional as ours
from cases import CASES, EVAL_CASES, LAYOUTS, TRAINING_CASES, Case
from support import assert_bitwise, check_forward, make_problem


@pytest.mark.parametrize("case", TRAINING_CASES, ids=str)
def test_training(case, device):
    check_forward(make_problem(case, device), training=True)


@pytest.mark.parametrize("case", EVAL_CASES, ids=str)
def test_evaluation(case, device):
    check_forward(make_problem(case, device), training=False)


def test_the_table_holds_what_it_is_meant_to():
    assert {case.layout for case in CASES} == set(LAYOUTS)
    assert {len(case.size) for case in CASES} == {2, 3, 4, 5}
    assert {case.size[1] for case in CASES} >= {0, 1, 3, 17, 64, 2048}
    assert any(not case.trainable for case in CASES)
    values = torch.randn(2, 3, 4, 5)
    laid_out = {name: lay_out(values) for name, lay_out in LAYOUTS.items()}
    for name, x in laid_out.items():
        assert name == "expanded" or torch.equal(x, values), name
    assert laid_out["channels_last"].is_contiguous(memory_format=torch.channels_last)
    assert laid_out["offset"].storage_offset() == 1
    assert not laid_out["channel_slice"].is_contiguous()
    volume = LAYOUTS["channels_last"](torch.randn(2, 3, 4, 5, 6))
    assert volume.is_contiguous(memory_format=torch.channels_last_3d)


def test_transposed_sequence_keeps_its_memory_order(device):
    x = torch.randn(4, 30, 17, device=device).transpose(1, 2)
    y = ours.batch_norm(x, None, None, training=True)
    assert y.stride() == x.stride() == (510, 1, 17)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_misaligned_rows(layout, device):
    """The same bits for every offset of the storage: no element depends on its alignment."""
    # A GPU loads 16 bytes at a time where it can, and sums in another order where it cannot.
    period = 1 if device.type == "cpu" else 4
    base = torch.randn(2 * 5 * 14 * 14 + 16, device=device)
    results = []
    for offset in range(17):
        view = base.roll(offset)[offset : offset + 1960].view(2, 5, 14, 14)
        x = torch.as_strided(
            view,
            view.size(),
            LAYOUTS[layout](view).stride(),
            view.storage_offset(),
        )
        results.append(ours.batch_norm(x, None, None, training=True))
    for offset, y in enumerate(results):
        assert_bitwise(f"y at offset {offset}", y, results[offset % period])


def test_input_is_left_alone(device):
    for layout in LAYOUTS:
        problem = make_problem(Case((3, 17, 7, 9), layout), device)
        before = problem.x.clone()
        problem.forward(training=True)
        assert_bitwise(layout, problem.x, before)
