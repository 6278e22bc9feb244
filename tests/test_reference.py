"""The oracle itself: against torch's own function and derivatives in float64."""

import pytest
import torch
import torch.nn.functional as F

from batchnorm_ext import reference

SIZES = [(7, 3), (4, 3, 5), (2, 3, 4, 5), (2, 3, 2, 3, 2)]
# float64 against float64: a few dozen roundings on values of order 1 to 10
TIGHT = {"rtol": 1e-12, "atol": 1e-12}


def _random(size):
    channels = size[1]
    x = 2 * torch.randn(size, dtype=torch.float64) + 1
    weight, bias, mean = torch.randn(3, channels, dtype=torch.float64)
    return x, weight, bias, mean, torch.rand(channels, dtype=torch.float64) + 0.5


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_forward_is_that_of_torch(size, training):
    x, weight, bias, mean, var = _random(size)
    result = reference.batch_norm(x, weight, bias, mean, var, None, training, 0.3, 1e-3)
    y = F.batch_norm(x, mean, var, weight, bias, training, 0.3, 1e-3)  # updates mean and var
    torch.testing.assert_close(result.y, y, **TIGHT)
    torch.testing.assert_close(result.running_mean, mean, **TIGHT)
    torch.testing.assert_close(result.running_var, var, **TIGHT)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_backward_is_the_derivative(size, training):
    x, weight, bias, mean, var = _random(size)
    dy = torch.randn_like(x)
    stats = reference.batch_norm(x, None, None, mean, var, training=training).stats
    leaves = [t.requires_grad_() for t in (x, weight, bias)]
    y = F.batch_norm(x, mean, var, weight, bias, training)
    expected = torch.autograd.grad(y, leaves, dy)
    result = reference.batch_norm_backward(dy, x, weight, stats, training)
    for actual, wanted in zip(result, expected, strict=True):
        torch.testing.assert_close(actual, wanted, **TIGHT)


def test_cumulative_momentum_is_the_average_over_batches():
    batches = 1 + 2 * torch.randn(5, 8, 3, dtype=torch.float64)
    mean, var, tracked = torch.zeros(3), torch.ones(3), torch.tensor(0)
    for x in batches:
        _, _, mean, var, tracked = reference.batch_norm(
            x, None, None, mean, var, tracked, training=True, momentum=None
        )
    assert tracked.item() == 5
    torch.testing.assert_close(mean, batches.mean((0, 1)), **TIGHT)
    torch.testing.assert_close(var, batches.var(1).mean(0), **TIGHT)


def test_changes_no_argument():
    x, weight, bias, mean, var = _random((4, 3))
    arguments = [x, weight, bias, mean, var, torch.tensor(2)]
    before = [a.clone() for a in arguments]
    reference.batch_norm(*arguments, training=True)
    assert all(torch.equal(a, b) for a, b in zip(arguments, before, strict=True))


def test_empty_batch_tracks_nothing():
    result = reference.batch_norm(
        torch.empty(0, 2), None, None, torch.zeros(2), torch.ones(2), torch.tensor(4), training=True
    )
    assert result.stats.isnan().all()
    assert result.running_mean.tolist() == [0, 0] and result.running_var.tolist() == [1, 1]
    assert result.num_batches_tracked.item() == 4


def test_known_values():
    """By hand: the channel (1, 3, 5, 7) has mean 4 and variance 5, unbiased 20/3."""
    x = torch.tensor([1.0, 3.0, 5.0, 7.0]).view(4, 1)
    result = reference.batch_norm(
        x,
        torch.tensor([5.0]),
        torch.tensor([1.0]),
        torch.zeros(1),
        torch.ones(1),
        None,
        True,
        0.5,
        0.0,
    )
    torch.testing.assert_close(result.y.flatten(), 5 * (x.flatten().double() - 4) / 5**0.5 + 1)
    assert result.running_mean.tolist() == [2.0]
    torch.testing.assert_close(result.running_var, torch.tensor([0.5 + 10 / 3]).double())
