// One configuration of one operation: runs the kernels twice without a reset, as a replayed graph would, and compares
// with sums in higher precision.
//
//   kernels op=backward dtype=bf16 outer=3 stats=5 inner=49 plan=policy=grid,ranks=3 seed=7 ...
//
// Others may follow, each after "--". Exit code 0 and the plans on the output, or 1 and what is off. Wherever the
// kernels shall write lies NaN before.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <limits>
#include <memory>
#include <string>
#include <type_traits>
#include <vector>

#include "after.h"
#include "checks.h"
#include "cuda/planner.h"
#include "emulate.h"
#include "problem.h"
#include "settings.h"

namespace {

using namespace batchnorm_ext;
using namespace batchnorm_ext::cuda;

template <typename T>
class Test : Problem<T> {
  using A = Acc<T>;
  using Problem<T>::settings_, Problem<T>::g_, Problem<T>::n_, Problem<T>::aligned_, Problem<T>::eps_;
  using Problem<T>::x_, Problem<T>::dy_, Problem<T>::residual_, Problem<T>::weight_, Problem<T>::bias_;
  using Problem<T>::running_mean_, Problem<T>::running_var_, Problem<T>::cell_of, Problem<T>::sums;
  using Problem<T>::of_batch, Problem<T>::of_running, Problem<T>::of_sums, Problem<T>::larger_sums, Problem<T>::total;
  using Problem<T>::lost, Problem<T>::walk_, Problem<T>::kUnit, Problem<T>::kMergeUnit, Problem<T>::kExactUnit;

 public:
  using Problem<T>::Problem;

  void run() {
    const std::string& op = settings_.text("op");
    if (op == "forward" || op == "eval" || op == "moments" || op == "apply" || op == "scale")
      forward(op);
    else if (op == "backward" || op == "eval_backward" || op == "sums_backward" || op == "grad_moments" ||
             op == "grad_apply")
      backward(op);
    else
      Settings::misuse(op);
  }

 private:
  After<T> after() const { return After<T>(settings_, residual_.data()); }
  bool is_activated() const { return after().exists(); }

  void launch(const Forward<T>& op, bool reduces, bool maps, int turn) {
    if constexpr (!std::is_same_v<T, double>)
      if (is_activated())
        return launch_op(ActivatedForward<T>{op, after().residual, after().activation()}, reduces, maps, turn);
    launch_op(op, reduces, maps, turn);
  }
  void launch(const Backward<T>& op, T* dresidual, bool reduces, bool maps, int turn) {
    if constexpr (!std::is_same_v<T, double>)
      if (is_activated())
        return launch_op(ActivatedBackward<T>{op, after().residual, dresidual, bias_.view(), after().activation()},
                         reduces, maps, turn);
    launch_op(op, reduces, maps, turn);
  }

  void launch_op(const auto& op, bool reduces, bool maps, int turn) {
    using Op = std::remove_cvref_t<decltype(op)>;
    // Of an empty tensor one that has its channels, as the launches of the library have it.
    const Geometry g = n_ > 0 ? g_ : Geometry{1, g_.channels, 1, g_.batch};
    const Request request{g, sizeof(T), Op::kKept, Op::kCoefficients + Op::kKnown, aligned_, reduces, maps};
    Device device;
    device.sms = static_cast<int>(settings_.number("sms"));
    device.shared_per_sm = device.shared_per_block = settings_.number("shared");
    device.cooperative = settings_.number("cooperative") != 0;
    const Plan plan = Planner(request, device, Override::from_text(settings_.text("plan").c_str())).plan();
    const Scratch scratch = plan.scratch();
    const Shape& s = plan.first.shape;
    const bool row = plan.pattern == Pattern::kRow;
    if (!counters_) {
      counters_ = std::make_unique<Buffer<unsigned>>(scratch.counter_bytes / sizeof(unsigned));
      scratch_ = std::make_unique<Buffer<unsigned char>>(scratch.bytes);
      std::fill_n(counters_->data(), counters_->size(), 0);
      constexpr const char* kPolicies[] = {"block", "grid", "split", "reduce", "map"};
      std::printf("policy=%s rule=\"%s\" row=%d pack=%d ranks=%d teams=%d groups=%d width=%d relay=%d\n",
                  kPolicies[static_cast<int>(plan.policy)], plan.rule, row, plan.pack, s.ranks, s.teams, s.groups,
                  s.width, s.relay);
    }
    // An element goes through so many additions in A at most: those of its thread, then one per thread. Their
    // roundings, of std 1 / sqrt(3) units, add up like the steps of a random walk: here are 3.5 times its std.
    const Exact own =
        row ? std::ceil(Exact(s.chunk) / kThreads) * plan.pack : std::ceil(Exact(s.chunk) / s.rows_at_once.divisor);
    walk_ = 2 * std::sqrt(own + kThreads);
    scratch_->clear();
    emulate(plan, op, counters_->data(), scratch_->data(), 4 * settings_.number("seed") + 2 * turn);
    for (int64_t i = 0; i < counters_->size(); ++i) check("counters", i, (*counters_)[i] & 0x7fffffffu, 0, 0);
  }

  // The schedule of the second launch is another, the bits of its outputs are the same.
  void check_repeats(int turn, const auto&... outputs) {
    std::vector<unsigned char> bytes;
    (outputs.append_to(bytes), ...);
    if (turn == 0) first_outputs_ = bytes;
    for (std::size_t i = 0; i < bytes.size(); ++i)
      check("byte of an output repeated", i, bytes[i], first_outputs_[i], 0);
  }

  void forward(const std::string& op) {
    const int64_t channels = g_.cells();
    const bool cumulative = settings_.is("momentum", "none"), tracks = op == "forward" || op == "apply",
               reduces = op == "forward" || op == "moments", maps = op != "moments",
               scales = op == "scale";  // the gradient of an evaluation: with the invstd there is and nothing else
    const Exact n = op == "apply" ? total() : n_;
    const Buffer<double> stats(2 * channels), sums_out(4 * channels + 1), sums_in = larger_sums(n);
    const Buffer<T> y(g_.numel(), aligned_);
    int64_t batches = 3;
    Forward<T> call{.x = x_.data(),
                    .y = maps && n_ > 0 ? y.data() : nullptr,
                    .geometry = g_,
                    .source = op == "eval"    ? Source::kRunning
                              : op == "apply" ? Source::kSums
                              : scales        ? Source::kStats
                                              : Source::kBatch,
                    .count = static_cast<double>(n_),
                    .eps = eps_,
                    .momentum = cumulative ? 0 : std::stod(settings_.text("momentum")),
                    .cumulative = cumulative,
                    .weight = weight_.view(),
                    .bias = bias_.view(),
                    .running_mean = running_mean_.view(),
                    .running_var = running_var_.view(),
                    .num_batches_tracked = tracks ? &batches : nullptr,
                    .sums = op == "apply" ? sums_in.data() : nullptr,
                    .sums_out = op == "moments" ? sums_out.data() : nullptr,
                    .stats = op == "moments" ? nullptr : stats.data(),
                    .centred = !scales};
    if (op == "moments" || scales) call.running_mean = call.running_var = {};
    if (scales) call.bias = {};
    for (int turn = 0; turn < 2; ++turn) {
      const std::vector<Statistics> before = of_running();
      const int64_t counted = batches;
      y.clear(), stats.clear(), sums_out.clear();
      for (int64_t c = 0; scales && c < channels; ++c) stats[channels + c] = static_cast<double>(1 / before[c].std);
      launch(call, reduces, maps, turn);
      check_repeats(turn, y, stats, sums_out);
      std::vector<Statistics> all = op == "eval" || scales ? before : op == "apply" ? of_sums(sums_in) : of_batch();
      for (int64_t c = 0; scales && c < channels; ++c) all[c].mean = 0;
      const bool moves = tracks && n > 0;
      check("num_batches_tracked", 0, batches, counted + moves, 0);
      const Exact factor = !moves ? 0 : cumulative ? 1 / Exact(counted + 1) : Exact(call.momentum);
      for (int64_t c = 0; c < channels; ++c) {
        const Statistics& s = all[c];
        const Exact mean_error = s.mean_error * s.std, var_error = s.var_error * s.std * s.std;
        if (op == "moments") {
          const Statistics out = of_sums(sums_out, c);
          check("sums: mean", c, out.mean, s.mean, mean_error);
          check("sums: variance", c, out.var, s.var, var_error + 4 * kExactUnit * s.mean * s.mean);
          check("sums: n", c, sums_out[4 * channels], n, 0);
        } else if (!scales) {
          check_rounded<double>("mean", c, stats[c], s.mean, mean_error);
          check_rounded<double>("invstd", c, stats[channels + c], 1 / s.std, s.invstd_error() / s.std);
        }
        track("running_mean", c, running_mean_, before[c].mean, factor, s.mean, mean_error);
        // One element has no unbiased variance.
        const Exact unbiased = n / (n - 1);
        track("running_var", c, running_var_, before[c].var, n > 1 ? factor : 0, s.var * unbiased,
              var_error * unbiased);
      }
      for (int64_t i = 0; maps && i < g_.numel(); ++i) {
        const int64_t c = cell_of(i);
        const Statistics& s = all[c];
        const Exact xhat = (widen(x_[i]) - s.mean) / s.std, weight = weight_.get(channel_of(g_, c)),
                    scaled = weight * xhat, bias = scales ? 0 : bias_.get(channel_of(g_, c));
        const Exact error = std::fabs(weight) * s.mean_error + std::fabs(scaled) * s.invstd_error() +
                            lost(widen(x_[i]), s.mean, weight / s.std);
        const Exact z = scaled + bias + after().added(i),
                    terms = std::fabs(scaled) + std::fabs(bias + after().added(i)) + error;
        // the slope of silu is at most 1.1, and exp and a division round as well
        check_rounded<T>("y", i, widen(y[i]), after().value(z), (is_activated() ? 2 : 1) * (error + 4 * kUnit * terms));
      }
    }
  }

  // A running statistic after a step of `factor` from `before` to `to`.
  void track(const char* name, int64_t c, const PerChannel<T>& running, Exact before, Exact factor, Exact to,
             Exact error) const {
    if (factor == 0) return check(name, c, running.get(c), before, 0);
    const Exact rounding = 4 * kMergeUnit * (std::fabs(before) + factor * std::fabs(to));
    check_channel(name, c, running, (1 - factor) * before + factor * to, factor * error + rounding);
  }

  void backward(const std::string& op) {
    const int64_t channels = g_.cells();
    const bool training = op != "eval_backward", halves = op == "grad_moments" || op == "grad_apply";
    const bool maps = op != "sums_backward" && op != "grad_moments", reduces = op != "grad_apply";
    const PerChannel<T> dweight(channels, weight_.is_float()), dbias(channels, weight_.is_float());
    const Buffer<double> stats(2 * channels), sums_out(2 * channels), sums_in(2 * channels), count(1);
    const Buffer<T> dx(g_.numel(), aligned_), dresidual(g_.numel(), aligned_);
    const std::vector<Statistics> all = training ? of_batch() : of_running();
    for (int64_t c = 0; c < channels; ++c) {
      stats[c] = static_cast<double>(all[c].mean);
      stats[channels + c] = static_cast<double>(1 / all[c].std);
    }
    const auto xhat = [&](int64_t i) -> Exact {
      return (widen(x_[i]) - Exact(stats[cell_of(i)])) * stats[channels + cell_of(i)];
    };
    const auto z = [&](int64_t i) -> Exact {
      const int64_t channel = channel_of(g_, cell_of(i));
      return weight_.get(channel) * xhat(i) + bias_.get(channel);
    };
    const auto dy = [&](int64_t i) -> Exact { return after().grad(widen(dy_[i]), z(i), i); };
    // How large it is, with what rounding z may add to it.
    const auto size = [&](int64_t i) -> Exact {
      return is_activated() ? std::fabs(widen(dy_[i])) * (1 + 8 * (1 + std::fabs(z(i)) + std::fabs(after().added(i))))
                            : std::fabs(dy(i));
    };
    std::vector<Exact> sum = sums(dy), dot = sums([&](int64_t i) { return dy(i) * xhat(i); });
    // How large the terms are: what rounding is relative to.
    std::vector<Exact> sum_terms = sums(size),
                       dot_terms = sums([&](int64_t i) { return size(i) * (1 + std::fabs(xhat(i))); });
    Backward<T> call{.dy = dy_.data(),
                     .x = x_.data(),
                     .dx = maps ? dx.data() : nullptr,
                     .geometry = g_,
                     .training = training,
                     .count = static_cast<double>(n_),
                     .total_count = op == "grad_apply" ? count.data() : nullptr,
                     .means = stats.data(),
                     .invstds = stats.data() + channels,
                     .weight = weight_.view(),
                     .dweight = {},
                     .dbias = {},
                     .sums = op == "grad_apply" ? sums_in.data() : nullptr,
                     .sums_out = op == "grad_moments" ? sums_out.data() : nullptr};
    if (!halves) call.dweight = dweight.view(), call.dbias = dbias.view();
    if (op == "grad_apply") {  // with sums that are not those of the batch
      count[0] = static_cast<double>(total());
      for (int64_t c = 0; c < channels; ++c) {
        sum[c] = sums_in[c] = static_cast<double>(2 * sum[c] + 1);
        dot[c] = sums_in[channels + c] = static_cast<double>(3 * dot[c]);
        sum_terms[c] = std::fabs(sum[c]), dot_terms[c] = std::fabs(dot[c]);
      }
    }
    for (int turn = 0; turn < 2; ++turn) {
      dx.clear(), dresidual.clear(), dweight.clear(), dbias.clear(), sums_out.clear();
      launch(call, maps ? dresidual.data() : nullptr, reduces, maps, turn);
      check_repeats(turn, dx, dresidual, dweight, dbias, sums_out);
      const Exact rounding = walk_ * kUnit, n = op == "grad_apply" ? count[0] : n_;
      for (int64_t c = 0; c < channels; ++c) {
        if (op == "grad_moments") {
          check("sums: dy", c, sums_out[c], sum[c], rounding * sum_terms[c]);
          check("sums: dy * xhat", c, sums_out[channels + c], dot[c], rounding * dot_terms[c]);
        } else if (!halves) {
          check_channel("dbias", c, dbias, sum[c], rounding * sum_terms[c]);
          check_channel("dweight", c, dweight, dot[c], rounding * dot_terms[c]);
        }
      }
      for (int64_t i = 0; maps && i < g_.numel(); ++i) {
        const int64_t c = cell_of(i);
        const Exact scale = weight_.get(channel_of(g_, c)) * stats[channels + c];
        const Exact average = training ? (sum[c] + xhat(i) * dot[c]) / n : 0;
        const Exact terms = training ? (sum_terms[c] + std::fabs(xhat(i)) * dot_terms[c]) / n : 0;
        const Exact slope = training ? dot[c] * stats[channels + c] / n : 0, bracket = size(i) + terms;
        if (is_activated()) check_rounded<T>("dresidual", i, widen(dresidual[i]), dy(i), 4 * kUnit * size(i));
        check_rounded<T>(
            "dx", i, widen(dx[i]), scale * (dy(i) - average),
            scale * (4 * kUnit * size(i) + rounding * terms + (training ? lost(widen(x_[i]), all[c].mean, slope) : 0)) +
                std::numeric_limits<A>::denorm_min() * bracket / 2);
      }
    }
  }

  std::vector<unsigned char> first_outputs_;
  std::unique_ptr<Buffer<unsigned>> counters_;
  std::unique_ptr<Buffer<unsigned char>> scratch_;
};

}  // namespace

int main(int count, char** arguments) {
  char** const end = arguments + count;
  for (char** next; arguments < end; arguments = next) {
    next = std::find_if(arguments + 1, end, [](const std::string& argument) { return argument == "--"; });
    const Settings settings(static_cast<int>(next - arguments), arguments);
    with_dtype(settings, [&](auto type) { Test<decltype(type)>(settings).run(); });
  }
  return failed;
}
