// One configuration of one operation: runs the kernels twice without a reset, as a replayed graph would, and compares
// with sums in higher precision.
//
//   kernels op=backward dtype=bf16 outer=3 stats=5 inner=49 plan=policy=grid,ranks=3 seed=7 ...
//
// Exit code 0 and the plan on the output, or 1 and what is off. Wherever the kernels shall write lies NaN before.
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <map>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "checks.h"
#include "cuda/norm.cuh"

namespace {

using namespace batchnorm_ext;
using namespace batchnorm_ext::cuda;

class Settings {
 public:
  Settings(int count, char** arguments) {
    for (int i = 1; i < count; ++i) {
      const std::string argument = arguments[i];
      const auto equals = std::min(argument.find('='), argument.size());
      const std::string key = argument.substr(0, equals);
      if (values_.count(key) == 0) misuse(argument);
      values_[key] = argument.substr(equals + 1);
    }
  }

  const std::string& text(const std::string& key) const { return values_.at(key); }
  int64_t number(const std::string& key) const { return std::stoll(text(key)); }
  bool is(const std::string& key, const std::string& value) const { return text(key) == value; }

  [[noreturn]] static void misuse(const std::string& argument) {
    std::fprintf(stderr, "unknown: %s\n", argument.c_str());
    std::exit(2);
  }

 private:
  std::map<std::string, std::string> values_{
      {"op", "forward"},      // eval moments apply scale, backward eval_backward sums_backward grad_moments grad_apply
      {"dtype", "f32"},       // f64 f16 bf16
      {"outer", "2"},         // the geometry
      {"stats", "3"},         // its channels
      {"inner", "4"},         // its runs
      {"data", "normal"},     // shifted outlier constant huge tiny nan inf
      {"data_seed", "1"},     // of all numbers
      {"aligned", "1"},       // 0: tensors start off the alignment of packs
      {"hook", "none"},       // relu
      {"parameters", "f32"},  // same: of the type of the input
      {"momentum", "0.25"},   // none: the cumulative average
      {"total", "-1"},        // elements behind the sums that apply and grad_apply get; -1: twice those at hand
      {"plan", ""},           // as BATCHNORM_EXT_CUDA_PLAN
      {"sms", "4"},           // the device
      {"shared", "131072"},   // its shared memory, in bytes
      {"cooperative", "1"},   // 0: it has no cooperative launches
      {"seed", "1"},          // of the schedule
  };
};

struct ReluAfterSum {
  static constexpr bool kExtra = true;
  template <typename A>
  A operator()(A value, A extra) const {
    return value + extra < 0 ? A(0) : value + extra;
  }
};

// The gradient passes where the second tensor is positive.
struct ReluGradient {
  static constexpr bool kExtra = true;
  template <typename A>
  A operator()(A value, A extra) const {
    return extra > 0 ? value : A(0);
  }
};

// Of a channel, and how far those of the kernel may be off.
struct Statistics {
  Exact mean, var, std;         // std = sqrt(var + eps)
  Exact mean_error, var_error;  // in units of std, and of its square
  Exact least;                  // eps, in units of the square of std

  // In units of 1 / std. A variance of which little is known may as well be 0.
  Exact invstd_error() const { return 1 / std::sqrt(std::max(1 - var_error, least)) - 1 + 0x1p-51L; }
};

template <typename T>
class Test {
  using A = Acc<T>;
  // Rounding to nearest: of the type that the kernels accumulate in, and of fp64, in which they merge.
  static constexpr Exact kUnit = kRounding<A>, kMergeUnit = 0x1p-53L;
  // How far the data go. float16 ends at 65504 and at 6e-8.
  static constexpr bool kHalf = std::is_same_v<T, __half>;
  static constexpr double kFar = kHalf ? 1e3 : 1e4, kOutlier = kHalf ? 1e4 : 1e6, kHuge = kHalf ? 0x1p10 : 1e30,
                          kTiny = kHalf ? 0x1p-16 : 1e-30;

 public:
  explicit Test(const Settings& settings)
      : settings_(settings),
        g_{settings.number("outer"), settings.number("stats"), settings.number("inner")},
        n_(g_.count()),
        aligned_(settings.number("aligned") != 0),
        eps_(settings.is("data", "tiny") ? 1e-5 * kTiny * kTiny : 1e-5),
        random_(static_cast<unsigned>(settings.number("data_seed"))),
        x_(values(settings.text("data"))),
        dy_(values("normal")),
        extra_(values("normal")),
        weight_(parameters(0.5, 1.5)),
        bias_(parameters(-1, 1)),
        running_mean_(parameters(-1, 1)),
        running_var_(parameters(0.5, 2)) {}

  void run() {
#if defined(BATCHNORM_EXT_KERNELS_OF)
    run<NoHook, NoHook>();
#else
    settings_.is("hook", "relu") ? run<ReluAfterSum, ReluGradient>() : run<NoHook, NoHook>();
#endif
  }

 private:
  template <typename Hook, typename GradHook>
  void run() {
    const std::string& op = settings_.text("op");
    if (op == "forward" || op == "eval" || op == "moments" || op == "apply" || op == "scale")
      forward<Hook>(op);
    else if (op == "backward" || op == "eval_backward" || op == "sums_backward" || op == "grad_moments" ||
             op == "grad_apply")
      backward<GradHook>(op);
    else
      Settings::misuse(op);
  }

  int64_t channel_of(int64_t i) const { return i / g_.inner % g_.stats; }

  Buffer<T> values(const std::string& kind) {
    std::normal_distribution<double> normal;
    std::vector<double> centre(g_.stats), spread(g_.stats);
    for (int64_t c = 0; c < g_.stats; ++c) centre[c] = normal(random_), spread[c] = 0.5 + std::fabs(normal(random_));
    Buffer<T> buffer(g_.numel(), aligned_);
    for (int64_t i = 0; i < g_.numel(); ++i) {
      const int64_t c = channel_of(i);
      const bool first = i < g_.stats * g_.inner && i % g_.inner == 0;
      double value = centre[c] + spread[c] * normal(random_);
      if (kind == "shifted") value += kFar * spread[c];
      if (kind == "outlier" && first) value += kOutlier;
      if (kind == "constant") value = centre[c];
      if (kind == "huge") value *= kHuge;
      if (kind == "tiny") value *= kTiny;
      if (kind == "nan" && c == 0 && i == g_.numel() - g_.stats * g_.inner) value = NAN;
      if (kind == "inf" && c == 0 && first) value = INFINITY;
      buffer[i] = narrow<T>(static_cast<A>(value));
    }
    return buffer;
  }

  PerChannel<T> parameters(double from, double to) {
    PerChannel<T> result(g_.stats, settings_.is("parameters", "f32"));
    std::uniform_real_distribution<double> uniform(from, to);
    for (int64_t c = 0; c < g_.stats; ++c) result.set(c, uniform(random_));
    return result;
  }

  // Sums over each channel of f(element).
  template <typename F>
  std::vector<Exact> sums(const F& f) const {
    std::vector<Exact> result(g_.stats);
    for (int64_t i = 0; i < g_.numel(); ++i) result[channel_of(i)] += f(i);
    return result;
  }

  void launch(const auto& op, bool reduces, bool maps, int turn) {
    using Op = std::remove_cvref_t<decltype(op)>;
    // Of an empty tensor one that has its channels, as the launches of the library have it.
    const Geometry g = n_ > 0 ? g_ : Geometry{1, g_.stats, 1};
    const Request request{g, sizeof(T), Op::kInputs, Op::kCoefficients, aligned_, reduces, maps};
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
    const Workspace workspace(counters_->data(), scratch_->data(), scratch);
    auto* const between = reinterpret_cast<double*>(scratch_->data() + scratch.between);
    unsigned seed = static_cast<unsigned>(4 * settings_.number("seed") + 2 * turn);
    cuda::run(plan, op, between, [&](Phase phase, const Launch& how, const Op& part) {
      with_kernel<Op>(phase, plan, [&](auto kernel) {
        emulator::launch({.grid = {static_cast<unsigned>(how.shape.teams), static_cast<unsigned>(how.shape.ranks)},
                          .block = kThreads,
                          .shared_bytes = static_cast<std::size_t>(how.shared_bytes),
                          .cooperative = phase == Phase::kFused && how.shape.ranks > 1,
                          .seed = seed++},
                         kernel, how.shape, part, workspace);
      });
    });
    for (int64_t i = 0; i < counters_->size(); ++i) check("counters", i, (*counters_)[i] & 0x7fffffffu, 0, 0);
  }

  // Of the elements of each channel. In units of std, squares of it for the variance:
  //   A      1, since each entry of a block is summed about a centre near its mean
  //   fp64   sqrt(1 + (x0 - mean)^2), and squared, since blocks are merged about the first element x0; and the mean
  std::vector<Statistics> of_batch() const {
    std::vector<Exact> mean = sums([&](int64_t i) { return widen(x_[i]); });
    for (Exact& value : mean) value /= n_;
    const std::vector<Exact> m2 =
        sums([&](int64_t i) { return std::pow(widen(x_[i]) - mean[channel_of(i)], Exact(2)); });
    return per_channel([&](int64_t c) {
      Statistics s = statistics(mean[c], m2[c] / n_);
      const Exact first = n_ > 0 ? (widen(x_[c * g_.inner]) - s.mean) / s.std : 0;
      const Exact merged = 1 + first * first;
      s.mean_error = walk_ * (kUnit + kMergeUnit * (std::sqrt(merged) + std::fabs(s.mean) / s.std));
      s.var_error = walk_ * (kUnit + kMergeUnit * merged);
      return s;
    });
  }

  // Of what lies in running_mean and running_var.
  std::vector<Statistics> of_running() const {
    return per_channel([&](int64_t c) { return statistics(running_mean_.get(c), running_var_.get(c)); });
  }

  // Of sums over more than the batch at hand. Squares about 0 hide what is (std / mean)^2 of them.
  std::vector<Statistics> of_sums(const Buffer<double>& sums) const {
    const Exact n = sums[2 * g_.stats];
    return per_channel([&](int64_t c) {
      const Exact mean = sums[c] / n, var = sums[g_.stats + c] / n - mean * mean;
      Statistics s = statistics(mean, var < 0 ? 0 : var);
      const Exact away = s.mean * s.mean / (s.std * s.std);
      s.mean_error = kMergeUnit * std::sqrt(away);
      s.var_error = 4 * kMergeUnit * (1 + away);
      return s;
    });
  }

  Statistics statistics(Exact mean, Exact var) const {
    return {mean, var, std::sqrt(var + eps_), 0, 0, eps_ / (var + eps_)};
  }

  template <typename F>
  std::vector<Statistics> per_channel(const F& f) const {
    std::vector<Statistics> result;
    for (int64_t c = 0; c < g_.stats; ++c) result.push_back(f(c));
    return result;
  }

  // Those of the batch as a part of `total` elements that are a little different.
  Buffer<double> larger_sums(Exact total) const {
    const std::vector<Statistics> batch = of_batch();
    Buffer<double> sums(2 * g_.stats + 1);
    for (int64_t c = 0; c < g_.stats; ++c) {
      Exact mean = (n_ > 0 ? batch[c].mean : 0) + 0.1L;
      if (total == 1) mean = static_cast<float>(mean);  // whose square is exact: there is no variance
      const Exact var = total > 1 ? 1.1L * (n_ > 0 ? batch[c].var : 1) + 0.1L : 0;
      sums[c] = static_cast<double>(total * mean);
      sums[g_.stats + c] = static_cast<double>(total * (var + mean * mean));
    }
    sums[2 * g_.stats] = static_cast<double>(total);
    return sums;
  }

  Exact total() const { return settings_.number("total") < 0 ? 2 * n_ : Exact(settings_.number("total")); }

  // The schedule of the second launch is another, the bits of its outputs are the same.
  void check_repeats(int turn, const auto&... outputs) {
    std::vector<unsigned char> bytes;
    (outputs.append_to(bytes), ...);
    if (turn == 0) first_outputs_ = bytes;
    for (std::size_t i = 0; i < bytes.size(); ++i)
      check("byte of an output repeated", i, bytes[i], first_outputs_[i], 0);
  }

  template <typename Hook>
  void forward(const std::string& op) {
    const int64_t channels = g_.stats;
    const bool cumulative = settings_.is("momentum", "none"), tracks = op == "forward" || op == "apply",
               reduces = op == "forward" || op == "moments", maps = op != "moments",
               scales = op == "scale";  // the gradient of an evaluation: with the invstd there is and nothing else
    const Exact n = op == "apply" ? total() : n_;
    const Buffer<double> stats(2 * channels), sums_out(2 * channels + 1), sums_in = larger_sums(n);
    const Buffer<T> y(g_.numel(), aligned_);
    int64_t batches = 3;
    Forward<T, Hook> call{.x = x_.data(),
                          .y = maps && n_ > 0 ? y.data() : nullptr,
                          .extra = extra_.data(),
                          .channels = channels,
                          .inner = g_.inner,
                          .source = op == "eval"    ? Source::kRunning
                                    : op == "apply" ? Source::kSums
                                    : scales        ? Source::kStats
                                                    : Source::kBatch,
                          .count = static_cast<double>(n_),
                          .eps = eps_,
                          .momentum = cumulative ? NAN : std::stod(settings_.text("momentum")),
                          .weight = weight_.view(),
                          .bias = bias_.view(),
                          .running_mean = running_mean_.view(),
                          .running_var = running_var_.view(),
                          .num_batches_tracked = tracks ? &batches : nullptr,
                          .sums = op == "apply" ? sums_in.data() : nullptr,
                          .sums_out = op == "moments" ? sums_out.data() : nullptr,
                          .stats = op == "moments" ? nullptr : stats.data(),
                          .centred = !scales,
                          .hook = Hook()};
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
          const Exact squares = s.var + s.mean * s.mean;
          check("sums: n * mean", c, sums_out[c], n * s.mean, n * mean_error);
          check("sums: squares", c, sums_out[channels + c], n * squares,
                n * (var_error + 2 * std::fabs(s.mean) * mean_error + 4 * kMergeUnit * squares));
          check("sums: n", c, sums_out[2 * channels], n, 0);
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
        const int64_t c = channel_of(i);
        const Statistics& s = all[c];
        const Exact xhat = (widen(x_[i]) - s.mean) / s.std, scaled = weight_.get(c) * xhat,
                    bias = scales ? 0 : bias_.get(c), extra = Hook::kExtra ? widen(extra_[i]) : 0;
        const Exact error = std::fabs(weight_.get(c)) * s.mean_error + std::fabs(scaled) * s.invstd_error();
        const Exact terms = std::fabs(scaled) + std::fabs(bias) + std::fabs(extra) + error;
        check_rounded<T>("y", i, widen(y[i]), Hook()(scaled + bias, extra), error + 4 * kUnit * terms);
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

  template <typename Hook>
  void backward(const std::string& op) {
    const int64_t channels = g_.stats;
    const bool training = op != "eval_backward", halves = op == "grad_moments" || op == "grad_apply";
    const bool maps = op != "sums_backward" && op != "grad_moments", reduces = op != "grad_apply";
    const PerChannel<T> dweight(channels, weight_.is_float()), dbias(channels, weight_.is_float());
    const Buffer<double> stats(2 * channels), sums_out(2 * channels), sums_in(2 * channels), count(1);
    const Buffer<T> dx(g_.numel(), aligned_);
    const std::vector<Statistics> all = training ? of_batch() : of_running();
    for (int64_t c = 0; c < channels; ++c) {
      stats[c] = static_cast<double>(all[c].mean);
      stats[channels + c] = static_cast<double>(1 / all[c].std);
    }
    const auto xhat = [&](int64_t i) -> Exact {
      return (widen(x_[i]) - Exact(stats[channel_of(i)])) * stats[channels + channel_of(i)];
    };
    const auto dy = [&](int64_t i) -> Exact { return Hook()(widen(dy_[i]), Hook::kExtra ? widen(extra_[i]) : A(0)); };
    std::vector<Exact> sum = sums(dy), dot = sums([&](int64_t i) { return dy(i) * xhat(i); });
    // How large the terms are: what rounding is relative to.
    std::vector<Exact> sum_terms = sums([&](int64_t i) { return std::fabs(dy(i)); }),
                       dot_terms = sums([&](int64_t i) { return std::fabs(dy(i)) * (1 + std::fabs(xhat(i))); });
    Backward<T, Hook> call{.dy = dy_.data(),
                           .x = x_.data(),
                           .dx = maps ? dx.data() : nullptr,
                           .extra = extra_.data(),
                           .channels = channels,
                           .training = training,
                           .count = static_cast<double>(n_),
                           .total_count = op == "grad_apply" ? count.data() : nullptr,
                           .stats = stats.data(),
                           .weight = weight_.view(),
                           .dweight = {},
                           .dbias = {},
                           .sums = op == "grad_apply" ? sums_in.data() : nullptr,
                           .sums_out = op == "grad_moments" ? sums_out.data() : nullptr,
                           .hook = Hook()};
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
      dx.clear(), dweight.clear(), dbias.clear(), sums_out.clear();
      launch(call, reduces, maps, turn);
      check_repeats(turn, dx, dweight, dbias, sums_out);
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
        const int64_t c = channel_of(i);
        const Exact scale = weight_.get(c) * stats[channels + c];
        const Exact average = training ? (sum[c] + xhat(i) * dot[c]) / n : 0;
        const Exact terms = training ? (sum_terms[c] + std::fabs(xhat(i)) * dot_terms[c]) / n : 0;
        check_rounded<T>("dx", i, widen(dx[i]), scale * (dy(i) - average),
                         scale * (4 * kUnit * std::fabs(dy(i)) + rounding * terms));
      }
    }
  }

  const Settings& settings_;
  Geometry g_;
  Exact n_;
  bool aligned_;
  double eps_;  // of the layer, not more than the variances
  Exact walk_ = 0;
  std::mt19937 random_;
  Buffer<T> x_, dy_, extra_;
  PerChannel<T> weight_, bias_, running_mean_, running_var_;
  std::vector<unsigned char> first_outputs_;
  std::unique_ptr<Buffer<unsigned>> counters_;
  std::unique_ptr<Buffer<unsigned char>> scratch_;
};

}  // namespace

int main(int count, char** arguments) {
  const Settings settings(count, arguments);
#if defined(BATCHNORM_EXT_KERNELS_OF)  // one type and no hooks, for mutants: there are many to compile
  Test<BATCHNORM_EXT_KERNELS_OF>(settings).run();
#else
  const std::string& dtype = settings.text("dtype");
  if (dtype == "f32")
    Test<float>(settings).run();
  else if (dtype == "f64")
    Test<double>(settings).run();
  else if (dtype == "f16")
    Test<__half>(settings).run();
  else if (dtype == "bf16")
    Test<__nv_bfloat16>(settings).run();
  else
    Settings::misuse(dtype);
#endif
  return failed;
}
