// Every operator schema, with what it computes. The sums run over the elements of one channel. With groups > 0 they run
// over those of one sample and one of so many groups of channels, in training only: group normalization, or instance
// normalization with groups of one channel. Then stats is [2, N * groups], and the running statistics move towards the
// average over the samples. Without `centred`, in training, the mean counts as 0, and avg(weight * dy) as well:
// normalization by the root mean square. weight and bias belong to the indices of `parameter_dim`: 1, or 2 for an x of
// three dimensions with a statistic for each index of the first two, groups = x.size(1).
#include <torch/library.h>

TORCH_LIBRARY(batchnorm_ext, m) {
  // The kernels take any layout. Without the tag, inductor copies what it holds in another one than eager code would:
  // on CPUs all inputs and outputs of convolutions, which it keeps in channels_last.
  const auto def = [&](const char* schema) { m.def(schema, {at::Tag::flexible_layout}); };

  // training:    mean = avg(x), invstd = 1 / sqrt(avg((x - mean)^2) + eps)
  // evaluation:  mean = running_mean, invstd = 1 / sqrt(running_var + eps)
  // y = (x - mean) * invstd * weight + bias,  stats = [mean, invstd] in float64, [2, C]
  // with a residual and an activation (activation_table.h):
  //   y = activation((x - mean) * invstd * weight + bias + residual)
  // An empty batch has no statistics (NaN).
  def("batch_norm(Tensor x, Tensor? weight, Tensor? bias, Tensor? running_mean, Tensor? running_var, bool training, "
      "float eps, int groups=0, bool centred=True, int parameter_dim=1, Tensor? residual=None, str activation=\"\") "
      "-> (Tensor y, Tensor stats)");

  // batch_norm in training, which also moves the running statistics:
  //   running_mean <- (1 - f) * running_mean + f * mean
  //   running_var  <- (1 - f) * running_var  + f * unbiased variance
  //   num_batches_tracked <- num_batches_tracked + 1
  // with f = momentum, or 1 / num_batches_tracked if momentum is None. An empty batch moves nothing.
  def("batch_norm_update(Tensor x, Tensor? weight, Tensor? bias, Tensor(a!) running_mean, Tensor(b!) running_var, "
      "Tensor(c!)? num_batches_tracked, float? momentum, float eps, int groups=0, Tensor? residual=None, "
      "str activation=\"\") -> (Tensor y, Tensor stats)");

  // The output of batch_norm again, bit for bit, from the statistics it gave. Has no derivative of its own. Not where
  // each element of a statistic has a weight of its own.
  def("batch_norm_map(Tensor x, Tensor? weight, Tensor? bias, Tensor stats, bool training, int groups, "
      "Tensor? residual, str activation) -> Tensor y");

  // xhat = (x - mean) * invstd,  dweight = sum(dy * xhat),  dbias = sum(dy)
  // training:    dx = invstd * (weight * dy - avg(weight * dy) - xhat * avg(weight * dy * xhat))
  // evaluation:  dx = weight * invstd * dy
  // Only what output_mask = [dx, dweight, dbias] asks for is computed; the rest is undefined (None). dweight has the
  // dtype of weight, dbias that of bias; without one, float32, or float64 for a float64 x.
  def("batch_norm_backward(Tensor dy, Tensor x, Tensor? weight, Tensor stats, bool training, bool[3] output_mask, "
      "ScalarType? bias_dtype=None, int groups=0, bool centred=True, int parameter_dim=1) "
      "-> (Tensor dx, Tensor dweight, Tensor dbias)");

  // The same through an activation of z: dresidual = activation'(z) * dy takes the place of dy. z is computed again
  // from x and `residual`. If there was a residual, `residual` is the output y instead for relu, relu6, hardtanh and
  // leaky_relu: y tells their derivative as well, and a network keeps it anyway. With a residual dx and dresidual are
  // both computed, whatever output_mask says of dx.
  def("batch_norm_activated_backward(Tensor dy, Tensor x, Tensor? weight, Tensor? bias, Tensor? residual, "
      "Tensor stats, bool training, bool[3] output_mask, ScalarType? bias_dtype, int groups, str activation) "
      "-> (Tensor dx, Tensor dweight, Tensor dbias, Tensor dresidual)");

  // batch_norm(x.view(-1, numel of normalized_shape), ..., groups=1, centred): each row of the last dimensions has
  // statistics of its own, and each of its elements a weight and a bias.
  def("layer_norm(Tensor x, int[] normalized_shape, Tensor? weight, Tensor? bias, bool centred, float eps) "
      "-> (Tensor y, Tensor stats)");

  // g * v / norm(v) with a norm for each index of `dim`, the first or the last dimension of v
  def("weight_norm(Tensor v, Tensor g, int dim) -> Tensor");

  // The halves of training, for statistics of more than the batch at hand: SyncBatchNorm adds the sums of all ranks
  // between them. They have no derivatives of their own.
  //
  // With n elements per channel, S1 = sum(x) and S2 = sum(x^2), in float64, [4C + 1]; zeros for an empty batch:
  // sums = [S1, leading bits | S1, rest | S2, leading bits | S2, rest | n]
  // The two parts of each make up more bits than one value has, so that S2 / n - mean^2 keeps the variance of channels
  // far from zero, and the leading bits of all batches add up without rounding: sums.h.
  def("moments(Tensor x) -> Tensor");

  // batch_norm in training with the statistics computed from `sums`, which may cover several batches:
  //   mean = S1 / n,  variance = S2 / n - mean^2, or 0 where that is within the rounding of the sums
  def("apply(Tensor x, Tensor? weight, Tensor? bias, Tensor sums, float eps, Tensor? residual=None, "
      "str activation=\"\") -> (Tensor y, Tensor stats)");

  // batch_norm_update with such statistics. The running statistics move even where x is empty, since they are to agree
  // on all ranks. For n == 0 there are no statistics (NaN) and nothing moves. For n == 1 there is no unbiased variance:
  // running_var stays.
  def("apply_update(Tensor x, Tensor? weight, Tensor? bias, Tensor(a!) running_mean, Tensor(b!) running_var, "
      "Tensor(c!)? num_batches_tracked, Tensor sums, float? momentum, float eps, Tensor? residual=None, "
      "str activation=\"\") -> (Tensor y, Tensor stats)");

  // grad_sums = [sum(dy) | sum(dy * xhat)] in float64, [2C]; zeros for an empty batch
  // With an activation dresidual takes the place of dy, with `residual` as in batch_norm_activated_backward. weight,
  // bias and `count`, see grad_apply, are read for z alone.
  def("grad_moments(Tensor dy, Tensor x, Tensor stats, Tensor? weight=None, Tensor? bias=None, Tensor? residual=None, "
      "Tensor? count=None, str activation=\"\") -> Tensor");

  // dx = weight * invstd * (dy - grad_sums[:C] / count - xhat * grad_sums[C:] / count),  count: one float64
  def("grad_apply(Tensor dy, Tensor x, Tensor? weight, Tensor stats, Tensor grad_sums, Tensor count) -> Tensor dx");

  // The same through an activation, with dresidual in the place of dy; without a residual it is undefined (None).
  def("activated_grad_apply(Tensor dy, Tensor x, Tensor? weight, Tensor? bias, Tensor? residual, Tensor stats, "
      "Tensor grad_sums, Tensor count, str activation) -> (Tensor dx, Tensor dresidual)");

  // apply(x, ..., sum of moments(x) over the ranks of the group), or apply_update where there are running statistics:
  // batch_norm in training on the batches of all ranks. In backward too, only sums cross the ranks: dx is the
  // gradient of the sum of all ranks' losses; dweight and dbias are this rank's part of that gradient. The gradient of
  // a residual is that of this rank, and needs no message. Error messages name `layer`.
  def("sync_batch_norm(Tensor x, Tensor? weight, Tensor? bias, Tensor(a!)? running_mean, Tensor(b!)? running_var, "
      "Tensor(c!)? num_batches_tracked, float? momentum, float eps, str group_name, str layer, "
      "Tensor? residual=None, str activation=\"\") -> (Tensor y, Tensor stats)");
}
