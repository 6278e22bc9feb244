"""Scaling of features, with the names and rules of ``sklearn.preprocessing``, as modules.

A scaler is fitted to all data at once or batch by batch, on one process or over the ranks of a
group. It is then a layer: its attributes are buffers, and ``scaler(x)`` is ``scaler.transform(x)``.
"""

import torch
import torch.distributed as dist
from torch import Tensor, nn

from batchnorm_ext._streams import Extremes, Moments

__all__ = ["MinMaxScaler", "NotFittedError", "StandardScaler"]


class NotFittedError(ValueError, AttributeError):
    """A scaler was used before ``fit``. The bases are those of scikit-learn's error."""


class _Scaler(nn.Module):
    """What both scalers share: checks, buffers that appear in ``fit``, the steps of fitting."""

    _fitted: tuple[str, ...] = ()  # the buffers

    def __init__(self, process_group: "dist.ProcessGroup | None" = None) -> None:
        super().__init__()
        self.process_group = process_group
        self.reset()

    def reset(self) -> None:
        """Forget what has been fitted."""
        for name in self._fitted:
            self.register_buffer(name, None)

    def fit(self, X: Tensor, y: object = None) -> "_Scaler":
        """Fit to X alone, whatever was fitted before; ``y`` is ignored. Returns the scaler."""
        values = self._checked(X, fitting=True, first=True)
        self.reset()
        return self._update(values)

    def partial_fit(self, X: Tensor, y: object = None) -> "_Scaler":
        """Fit to X and all that was fitted before; ``y`` is ignored. Returns the scaler.

        With a process group every rank calls this, each with its own X, which may be empty.
        """
        return self._update(self._checked(X, fitting=True, first=not self._is_fitted()))

    def fit_transform(self, X: Tensor, y: object = None) -> Tensor:
        """``fit(X).transform(X)``."""
        return self.fit(X).transform(X)

    def forward(self, X: Tensor) -> Tensor:
        return self.transform(X)

    @property
    def n_features_in_(self) -> int:
        """The number of features that the scaler was fitted to."""
        self._require_fitted()
        return self.n_samples_seen_.numel()

    def _is_fitted(self) -> bool:
        return self.n_samples_seen_ is not None

    def _require_fitted(self) -> None:
        if not self._is_fitted():
            raise NotFittedError(
                f"This {type(self).__name__} instance is not fitted yet. Call 'fit' with "
                "appropriate arguments before using this estimator."
            )

    def _checked(self, X: Tensor, fitting: bool = False, first: bool = False) -> Tensor:
        """X as floating point: for fitting, as ``(samples, features)``."""
        X = torch.as_tensor(X)
        if X.is_complex():
            raise ValueError(f"Complex data not supported: expected real X, got {X.dtype}")
        if X.dim() < 2:
            raise ValueError(
                f"Expected 2D array, got {X.dim()}D array instead: X of size {tuple(X.shape)} is "
                "to be (samples, features)"
            )
        if not fitting:
            self._require_fitted()
        if not first and X.size(-1) != self.n_features_in_:
            raise ValueError(
                f"X has {X.size(-1)} features, but {type(self).__name__} is expecting "
                f"{self.n_features_in_} features as input."
            )
        if not X.is_floating_point():
            X = X.double()
        if fitting and X.numel() == 0 and (X.size(-1) == 0 or self.process_group is None):
            raise ValueError(
                f"Found array with {X.shape[:-1].numel()} sample(s) (shape={tuple(X.shape)}) while "
                f"a minimum of 1 is required by {type(self).__name__}."
            )
        return X.detach().flatten(0, -2) if fitting else X

    def _keep(self, **values: Tensor | None) -> "_Scaler":
        for name, value in values.items():
            setattr(self, name, value)
        return self

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *arguments) -> None:
        """A scaler that is not fitted takes the buffers of one that is."""
        for name in self._fitted:
            saved = state_dict.get(prefix + name)
            if saved is not None and getattr(self, name) is None:
                setattr(self, name, torch.empty_like(saved))
        super()._load_from_state_dict(state_dict, prefix, *arguments)


class StandardScaler(_Scaler):
    r"""Scale each feature to zero mean and unit variance (z-score), as
    ``sklearn.preprocessing.StandardScaler``.

    .. math:: z = \frac{x - \mathrm{E}[x]}{\sqrt{\mathrm{Var}[x]}}

    The moments come from one pass over the data: batches of any size, in any order and on any rank,
    give what one batch of all gives, up to rounding in float64 (Chan, Golub & LeVeque, *Updating
    formulae and a pairwise algorithm for computing sample variances*, 1979, equation 2.1). NaN is
    left out in fitting and stays NaN in transforming. A constant feature becomes 0.

    Args:
        with_mean: subtract the mean.
        with_std: divide by the standard deviation.
        process_group: the ranks whose data is fitted together. Default: this process alone.

    Attributes:
        mean_, var_, scale_: ``(features,)``, float64. ``var_`` and ``scale_`` are None without
            ``with_std``, and without ``with_mean`` ``mean_`` as well.
        n_samples_seen_: ``(features,)``, int64: the values behind each, NaN left out.
        n_features_in_: int.

    Shape:
        ``(samples, features)``, or more dimensions with the features last. The result has the dtype
        of the input; integers become float64.

    Raises:
        ValueError: no samples; less than two dimensions; another number of features; complex data.
        NotFittedError: ``transform`` or ``inverse_transform`` before ``fit``.

    Example::

        >>> scaler = batchnorm_ext.preprocessing.StandardScaler()
        >>> scaler.fit_transform(torch.tensor([[1.0, 5.0], [3.0, 5.0]]))
        tensor([[-1.,  0.],
                [ 1.,  0.]])
    """

    _fitted = ("mean_", "var_", "scale_", "n_samples_seen_")

    def __init__(
        self,
        *,
        with_mean: bool = True,
        with_std: bool = True,
        process_group: "dist.ProcessGroup | None" = None,
    ) -> None:
        super().__init__(process_group)
        self.with_mean, self.with_std = with_mean, with_std

    def _update(self, values: Tensor) -> "StandardScaler":
        moments = Moments.of_known(values.double()).over_ranks(self.process_group)
        if self._is_fitted():
            moments = self._so_far().merged(moments)
        mean = torch.where(moments.count > 0, moments.mean, torch.nan)
        return self._keep(
            mean_=mean if self.with_mean or self.with_std else None,
            var_=moments.variance if self.with_std else None,
            scale_=moments.scale if self.with_std else None,
            n_samples_seen_=moments.count.long(),
        )

    def _so_far(self) -> Moments:
        """What is not kept is not asked for either: 0 stands for it."""
        count = self.n_samples_seen_.double()
        mean, var = (torch.zeros_like(count) if t is None else t for t in (self.mean_, self.var_))
        seen = count > 0
        return Moments(count, mean.where(seen, 0), (var * count).where(seen, 0))

    def transform(self, X: Tensor) -> Tensor:
        """``(X - mean_) / scale_``, computed in float64 and rounded to the dtype of X."""
        X = self._checked(X)
        z = X.double()
        if self.with_mean:
            z = z - self.mean_
        if self.with_std:
            z = z / self.scale_
        return z.to(X.dtype)

    def inverse_transform(self, X: Tensor) -> Tensor:
        """``X * scale_ + mean_``: what ``transform`` was given."""
        X = self._checked(X)
        x = X.double()
        if self.with_std:
            x = x * self.scale_
        if self.with_mean:
            x = x + self.mean_
        return x.to(X.dtype)

    def extra_repr(self) -> str:
        return f"with_mean={self.with_mean}, with_std={self.with_std}"


class MinMaxScaler(_Scaler):
    r"""Scale each feature to a range, as ``sklearn.preprocessing.MinMaxScaler``.

    .. math:: z = \frac{x - \min x}{\max x - \min x} (b - a) + a

    NaN is left out in fitting and stays NaN in transforming. A constant feature becomes a.

    Args:
        feature_range: (a, b), with a < b.
        clip: whether ``transform`` clips to this range what lies outside of the fitted one.
        process_group: the ranks whose data is fitted together. Default: this process alone.

    Attributes:
        data_min_, data_max_, data_range_, scale_, min_: ``(features,)``, float64. The result is
            ``X * scale_ + min_``.
        n_samples_seen_: ``(features,)``, int64: the values behind each, NaN left out.
        n_features_in_: int.

    Shape:
        ``(samples, features)``, or more dimensions with the features last. The result has the dtype
        of the input; integers become float64.

    Raises:
        ValueError: a range that is empty; no samples; less than two dimensions; another number of
            features; complex data.
        NotFittedError: ``transform`` or ``inverse_transform`` before ``fit``.

    Example::

        >>> scaler = batchnorm_ext.preprocessing.MinMaxScaler((0, 10))
        >>> scaler.fit_transform(torch.tensor([[1.0], [2.0], [5.0]])).flatten()
        tensor([ 0.0000,  2.5000, 10.0000])
    """

    _fitted = ("data_min_", "data_max_", "data_range_", "scale_", "min_", "n_samples_seen_")

    def __init__(
        self,
        feature_range: tuple[float, float] = (0, 1),
        *,
        clip: bool = False,
        process_group: "dist.ProcessGroup | None" = None,
    ) -> None:
        low, high = feature_range
        if not low < high:
            raise ValueError(
                "Minimum of desired feature range must be smaller than maximum. Got "
                f"{feature_range}."
            )
        super().__init__(process_group)
        self.feature_range, self.clip = (low, high), clip

    def _update(self, values: Tensor) -> "MinMaxScaler":
        extremes = Extremes.of_known(values.double()).over_ranks(self.process_group)
        if self._is_fitted():
            so_far = Extremes(self.n_samples_seen_, self.data_min_, self.data_max_)
            extremes = so_far.merged(extremes)
        count = extremes.count
        low, high = (t.where(count > 0, torch.nan) for t in extremes[1:])
        extent = high - low
        a, b = self.feature_range
        # where sklearn sees a constant: fewer than ten roundings of 1
        scale = (b - a) / extent.where(extent >= 10 * torch.finfo(torch.float64).eps, 1.0)
        scale = scale.where(count > 0, torch.nan)
        return self._keep(
            data_min_=low,
            data_max_=high,
            data_range_=extent,
            scale_=scale,
            min_=a - low * scale,
            n_samples_seen_=count,
        )

    def transform(self, X: Tensor) -> Tensor:
        """``X * scale_ + min_``, computed in float64 and rounded to the dtype of X."""
        X = self._checked(X)
        z = X.double() * self.scale_ + self.min_
        return (z.clamp(*self.feature_range) if self.clip else z).to(X.dtype)

    def inverse_transform(self, X: Tensor) -> Tensor:
        """``(X - min_) / scale_``: what ``transform`` was given, where it was not clipped."""
        X = self._checked(X)
        return ((X.double() - self.min_) / self.scale_).to(X.dtype)

    def extra_repr(self) -> str:
        return f"feature_range={self.feature_range}, clip={self.clip}"
