"""Scalers, against scikit-learn and against one pass over all data."""

import warnings

import pytest
import torch
from torch import nn

from batchnorm_ext.preprocessing import MinMaxScaler, NotFittedError, StandardScaler
from support import assert_within

pytestmark = pytest.mark.only("cpu", reason="scikit-learn computes on the CPU")

STANDARD = {
    "plain": {},
    "no mean": {"with_mean": False},
    "no std": {"with_std": False},
    "neither": {"with_mean": False, "with_std": False},
}
MIN_MAX = {
    "plain": {},
    "symmetric": {"feature_range": (-1, 1)},
    "clipped": {"feature_range": (0, 10), "clip": True},
}
CASES = [(StandardScaler, o) for o in STANDARD.values()]
CASES += [(MinMaxScaler, o) for o in MIN_MAX.values()]
each_scaler = pytest.mark.parametrize("scaler, options", CASES)
ATTRIBUTES = {
    StandardScaler: ("mean_", "var_", "scale_"),
    MinMaxScaler: ("data_min_", "data_max_", "data_range_", "scale_", "min_"),
}
EXACT = 1e-12  # relative; both compute in float64, in another order


def _data(dtype=torch.float64, far=0.0):
    """Features on scales from 1e-3 to 1e6, of which one is constant."""
    x = torch.randn(101, 6, dtype=torch.float64) * torch.logspace(-3, 6, 6, dtype=torch.float64)
    x += far
    x[:, 2] = 7.3
    return x.to(dtype)


def _sklearn(scaler, options, batches):
    preprocessing = pytest.importorskip("sklearn.preprocessing")
    other = getattr(preprocessing, scaler.__name__)(**options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # of a feature that is all NaN
        for batch in batches:
            other.partial_fit(batch.numpy())
    return other


def _assert_like(name, actual, expected):
    """scikit-learn keeps the extremes of float32 in float32."""
    expected = torch.as_tensor(expected)
    single = expected.dtype == torch.float32
    eps, least = (4 * torch.finfo(torch.float32).eps, 1) if single else (EXACT, 1e-3)
    assert_within(name, actual, expected, eps * expected.abs().clamp(min=least))


def _assert_fitted_like(fitted, other):
    for name in ATTRIBUTES[type(fitted)]:
        if (expected := getattr(other, name)) is None:
            assert getattr(fitted, name) is None
        else:
            _assert_like(name, getattr(fitted, name), expected)
    assert fitted.n_features_in_ == other.n_features_in_


@each_scaler
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.int64])
@pytest.mark.parametrize("sizes", [[101], [50, 1, 50], [1] * 101])
def test_like_sklearn(scaler, options, dtype, sizes):
    x = _data(dtype)
    other, fitted = _sklearn(scaler, options, x.split(sizes)), scaler(**options)
    for batch in x.split(sizes):
        assert fitted.partial_fit(batch) is fitted
    _assert_fitted_like(fitted, other)
    new = _data(dtype) * 2
    z = fitted.transform(new)
    eps = EXACT if z.dtype == torch.float64 else 8 * torch.finfo(z.dtype).eps
    expected = torch.as_tensor(other.transform(new.numpy().copy()))
    assert z.dtype == expected.dtype
    assert_within("z", z, expected, eps * expected.abs().clamp(min=1))
    if z.dtype == torch.float64 and not options.get("clip"):
        assert_within("x", fitted.inverse_transform(z), new.double(), EXACT * 1e7)


@each_scaler
def test_nan_is_left_out_and_kept(scaler, options):
    x = _data()
    x[::3, 0] = x[:, 4] = torch.nan
    other, fitted = _sklearn(scaler, options, [x[:40], x[40:]]), scaler(**options)
    fitted.partial_fit(x[:40]).partial_fit(x[40:])
    _assert_fitted_like(fitted, other)
    assert fitted.n_samples_seen_.tolist() == [67, 101, 101, 101, 0, 101]
    z = fitted.transform(x)
    assert (z.isnan() == x.isnan()).all()


@pytest.mark.parametrize("far", [0.0, 1e6, 1e12])
def test_batches_in_any_order_are_one_pass(far):
    x = _data(far=far)
    whole = StandardScaler().fit(x)
    for order in range(3):
        fitted = StandardScaler()
        batches = x[torch.randperm(len(x))].split([3, 50, 1, 47])
        for batch in batches:
            fitted.partial_fit(batch)
        assert_within("mean", fitted.mean_, whole.mean_, EXACT * whole.mean_.abs().clamp(min=1))
        # means are rounded, and the distance of two of them, up to some std, is squared
        rounding = 32 * far * torch.finfo(torch.float64).eps
        noise = rounding * (whole.var_.sqrt() + rounding)
        assert_within("var", fitted.var_, whole.var_, 1e-11 * whole.var_ + noise), order


def test_constant_features_become_0_or_the_lower_end():
    x = torch.tensor([[1000.1, 1.0], [1000.1, 2.0], [1000.1, 4.0]])
    assert (StandardScaler().fit_transform(x)[:, 0] == 0).all()
    assert (MinMaxScaler((3, 5)).fit_transform(x)[:, 0] == 3).all()


@each_scaler
def test_layer(scaler, options):
    """First layer of a network: a module with a state, which can be exported."""
    x = _data(torch.float32)
    fitted = scaler(**options).fit(x)
    loaded = nn.Sequential(scaler(**options), nn.Linear(6, 2))
    model = nn.Sequential(fitted, nn.Linear(6, 2))
    loaded.load_state_dict(model.state_dict())
    expected = model(x)
    assert torch.equal(loaded(x), expected)
    exported = torch.export.export(model, (x,)).module()
    assert torch.equal(exported(x), expected)
    assert fitted(x.view(1, *x.shape)).shape == (1, *x.shape)


@each_scaler
def test_bad_input_changes_nothing(scaler, options):
    fitted = scaler(**options)
    for method in (fitted.transform, fitted.inverse_transform, fitted):
        with pytest.raises(NotFittedError, match=f"This {scaler.__name__} instance is not fitted"):
            method(_data())
    with pytest.raises(AttributeError):
        fitted.n_features_in_  # noqa: B018
    fitted.fit(_data())
    before = {name: value.clone() for name, value in fitted.state_dict().items()}
    bad = {
        f"X has 5 features, but {scaler.__name__} is expecting 6": _data()[:, :5],
        "Expected 2D array, got 1D array": _data()[0],
        r"Found array with 0 sample\(s\) \(shape=\(0, 6\)\)": _data()[:0],
        "Complex data not supported": _data().to(torch.complex64),
    }
    for message, x in bad.items():
        with pytest.raises(ValueError, match=message):
            fitted.partial_fit(x)
    with pytest.raises(ValueError, match="X has 5 features"):
        fitted.transform(_data()[:, :5])
    assert all(torch.equal(value, before[name]) for name, value in fitted.state_dict().items())


def test_range_that_is_empty():
    with pytest.raises(ValueError, match=r"Minimum of desired feature range .* Got \(1, 1\)"):
        MinMaxScaler((1, 1))


def fit_on_ranks():
    import torch.distributed as dist

    rank, generator = dist.get_rank(), torch.Generator().manual_seed(0)
    x = torch.randn(60, 3, dtype=torch.float64, generator=generator) * 3 + 100
    x[::7, 1] = torch.nan
    shards = x.split([11, 0, 49])  # unequal, one empty
    for scaler in (StandardScaler, MinMaxScaler):
        fitted = scaler(process_group=dist.group.WORLD)
        fitted.partial_fit(shards[rank][:5]).partial_fit(shards[rank][5:])
        whole = scaler().fit(x)
        for name in ATTRIBUTES[scaler]:
            _assert_like(name, getattr(fitted, name), getattr(whole, name))
        assert torch.equal(fitted.n_samples_seen_, whole.n_samples_seen_)


def test_ranks(ranks):
    ranks(3).run(fit_on_ranks)
