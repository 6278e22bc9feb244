"""Population statistics of batch normalization, against a direct computation in float64."""

import copy

import pytest
import torch
from torch import nn

import batchnorm_ext
from batchnorm_ext import as_affine, update_population_stats
from support import assert_bitwise, assert_within

pytestmark = pytest.mark.only("cpu", reason="the kernels behind it have tests of their own")

C = 3
CLOSE = 1e-6  # relative: the buffers are float32


def _batches(sizes, far=5.0):
    return [torch.randn(n, C, 4, 4) * torch.arange(1.0, C + 1)[:, None, None] + far for n in sizes]


def _model(package=batchnorm_ext, **options):
    return nn.Sequential(package.BatchNorm2d(C, **options), nn.ReLU(), package.BatchNorm2d(C))


def _values(x):
    return x.double().movedim(1, 0).flatten(1)


def _expected(batches, method):
    if method == "pooled":
        values = torch.cat([_values(x) for x in batches], 1)
        return values.mean(1), values.var(1)
    means, variances = (torch.stack([f(_values(x)) for x in batches]) for f in _MOMENTS)
    return means.mean(0), variances.mean(0)


_MOMENTS = (lambda v: v.mean(1), lambda v: v.var(1))


@pytest.mark.parametrize("method", ["pooled", "paper"])
@pytest.mark.parametrize("sizes", [[8, 8, 8], [8, 1, 20], [5]])
@pytest.mark.parametrize("package", [nn, batchnorm_ext])
def test_statistics_of_a_data_set(method, sizes, package):
    model, batches = _model(package), _batches(sizes)
    update_population_stats(model, batches, method=method)
    # the second layer sees what training mode gives
    inner = copy.deepcopy(model[:2])
    for layer, seen in ((model[0], batches), (model[2], [inner(x) for x in batches])):
        mean, variance = _expected(seen, method)
        assert_within("mean", layer.running_mean, mean, CLOSE * mean.abs().max())
        assert_within("variance", layer.running_var, variance, CLOSE * variance.abs().max())


def test_far_from_zero():
    model, batches = _model(), _batches([4, 9], far=1e4)
    update_population_stats(model, batches)
    _, variance = _expected(batches, "pooled")
    assert_within("variance", model[0].running_var, variance, 1e-5 * variance)


def test_what_stays():
    model = nn.Sequential(
        nn.BatchNorm2d(C),
        nn.Dropout(),
        nn.BatchNorm2d(C),
        nn.BatchNorm2d(C, track_running_stats=False),
    )
    model.append(nn.InstanceNorm2d(C, track_running_stats=True))
    model.train()
    model[2].eval()
    modes = [module.training for module in model.modules()]
    before = copy.deepcopy(model.state_dict())
    update_population_stats(model, iter(_batches([4] * 5)), num_batches=2)
    after = model.state_dict()
    assert [module.training for module in model.modules()] == modes
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"0.running_mean", "0.running_var"}
    assert not any(module._forward_hooks for module in model.modules())


def test_number_of_batches():
    model, other, batches = _model(), _model(), _batches([4] * 5)
    update_population_stats(model, batches, num_batches=2)
    update_population_stats(other, batches[:2])
    assert_bitwise("mean", model[0].running_mean, other[0].running_mean)


def test_batches_as_a_loader_gives_them():
    x = _batches([4])[0]

    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = batchnorm_ext.BatchNorm2d(C)

        def forward(self, images):
            return self.norm(images)

    model, other = Named(), Named()
    update_population_stats(model, [{"images": x}])
    update_population_stats(other, [(x, torch.zeros(4))])
    assert_bitwise("mean", model.norm.running_mean, other.norm.running_mean)


def test_an_error_leaves_the_model_as_it_was():
    model = _model()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match="expected 4D input"):
        update_population_stats(model, [*_batches([4]), torch.randn(3)])
    for loader, options, message in (
        ([], {}, "at least one batch"),
        (_batches([4]), {"method": "mean"}, "expected method to be one of .* got 'mean'"),
    ):
        with pytest.raises(ValueError, match=message):
            update_population_stats(model, loader, **options)
    with pytest.raises(ValueError, match=r"call model.train\(\) first"):
        update_population_stats(model.eval(), _batches([4]))
    for name, value in model.state_dict().items():
        assert_bitwise(name, value, before[name])
    assert not any(module._forward_hooks for module in model.modules())


def population_on_ranks():
    import torch.distributed as dist

    rank = dist.get_rank()
    torch.manual_seed(0)
    batches = _batches([4, 9, 2, 1])
    for method in ("pooled", "paper"):
        model = _model()
        mine = batches[:1] if rank == 0 else batches[1:]  # unequal numbers
        update_population_stats(model, mine, method=method, process_group=dist.group.WORLD)
        mean, variance = _expected(batches, method)
        assert_within("mean", model[0].running_mean, mean, CLOSE * mean.abs().max())
        assert_within("variance", model[0].running_var, variance, CLOSE * variance.abs().max())
        sync = batchnorm_ext.convert_sync_batchnorm(_model())
        pairs = [torch.cat(batches[:2]), torch.cat(batches[2:])]
        update_population_stats(sync, [batches[rank], batches[2 + rank]], method=method)
        mean, variance = _expected(pairs, method)
        assert_within("mean", sync[0].running_mean, mean, CLOSE * mean.abs().max())
        assert_within("variance", sync[0].running_var, variance, CLOSE * variance.abs().max())


def test_ranks(ranks):
    ranks(2).run(population_on_ranks)


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("package", [nn, batchnorm_ext])
def test_affine_view(affine, package):
    for layer in (
        package.BatchNorm2d(C, affine=affine),
        package.InstanceNorm2d(C, affine=affine, track_running_stats=True),
    ):
        for tensor in (*layer.parameters(), layer.running_mean, layer.running_var):
            nn.init.uniform_(tensor, 0.5, 2)
        (x,) = _batches([4])
        scale, shift = as_affine(layer)
        y = x * scale[:, None, None] + shift[:, None, None]
        assert_within("y", y, layer.eval()(x), 2e-6 * y.abs().max())


def test_affine_view_without_statistics():
    for layer in (
        nn.BatchNorm2d(C, track_running_stats=False),
        nn.GroupNorm(1, C),
        nn.Linear(2, 2),
    ):
        with pytest.raises(ValueError, match="with running statistics, got"):
            as_affine(layer)


def test_worked_example():
    """Rows 1..5 to 5..9: down each column -1.4142, -0.7071, 0, 0.7071, 1.4142."""
    x = torch.arange(1.0, 6)[:, None] + torch.arange(5.0)
    expected = torch.tensor([-(2**0.5), -(0.5**0.5), 0, 0.5**0.5, 2**0.5])[:, None].expand(5, 5)
    # eps = 1e-5 beside a variance of 2 costs 2.5e-6 of the result
    assert_within("y", batchnorm_ext.BatchNorm1d(5)(x), expected, 4e-6)
    smaller = batchnorm_ext.BatchNorm1d(5, eps=1e-12)(x)
    assert_within("y", smaller, expected, 2.5e-7)
