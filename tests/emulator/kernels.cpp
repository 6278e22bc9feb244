// One configuration of one operation: runs the kernels twice without a reset, as a replayed graph would, and compares
// with sums in fp64.
//
//   kernels op=backward dtype=bf16 outer=3 stats=5 inner=49 policy=grid seed=1 ...
//
// Exit code 0 and the plan on the output, or 1 and what is off. Wherever the kernels shall write lies NaN before.
#include <cstdio>
#include <cstdlib>
#include <limits>
#include <map>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "../../csrc/cuda/norm.cuh"

namespace {

using namespace batchnorm_ext;
using namespace batchnorm_ext::cuda;

struct Settings {
  std::map<std::string, std::string> values;

  std::string text(const std::string& key, const std::string& otherwise) const {
    const auto found = values.find(key);
    return found == values.end() ? otherwise : found->second;
  }
  int64_t number(const std::string& key, int64_t otherwise) const {
    return std::stoll(text(key, std::to_string(otherwise)));
  }
  bool is(const std::string& key, const std::string& value) const { return text(key, "") == value; }
};

// Of exactly so many elements, poisoned, and off the alignment of packs where asked.
template <typename T>
class Buffer {
 public:
  explicit Buffer(int64_t count, bool aligned = true)
      : count_(count),
        memory_(static_cast<T*>(std::aligned_alloc(64, (count * sizeof(T) + 127) / 64 * 64)), std::free),
        begin_(memory_.get() + !aligned) {
    clear();
  }
  void clear() { emulator::poison(begin_, count_ * sizeof(T)); }
  T* data() const { return begin_; }
  T& operator[](int64_t i) const { return begin_[i]; }
  int64_t size() const { return count_; }

 private:
  int64_t count_;
  std::unique_ptr<T, void (*)(void*)> memory_;
  T* begin_;
};

struct ReluAfterSum {
  static constexpr bool kExtra = true;
  template <typename A>
  A operator()(A value, A extra) const {
    return value + extra > 0 ? value + extra : A(0);
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

bool failed = false;

void check(const char* name, int64_t at, double actual, double expected, double bound) {
  if (actual == expected || (std::isnan(actual) && std::isnan(expected)) || std::fabs(actual - expected) <= bound)
    return;
  if (!failed)
    std::fprintf(stderr, "%s[%ld]: got %.9g for %.9g, off by %.3g, allowed %.3g\n", name, static_cast<long>(at), actual,
                 expected, std::fabs(actual - expected), bound);
  failed = true;
}

template <typename T>
constexpr double kEpsilon = sizeof(T) == 8              ? 0x1p-53
                            : sizeof(T) == 4            ? 0x1p-24
                            : std::is_same_v<T, __half> ? 0x1p-11
                                                        : 0x1p-8;

template <typename T>
class Test {
  using A = Acc<T>;

 public:
  explicit Test(const Settings& settings)
      : settings_(settings),
        g_{settings.number("outer", 2), settings.number("stats", 3), settings.number("inner", 4)},
        aligned_(settings.number("aligned", 1) != 0),
        random_(static_cast<unsigned>(settings.number("data_seed", 1))),
        x_(values(settings.text("data", "normal"))),
        dy_(values("normal")),
        extra_(values("normal")),
        weight_(parameters(0.5, 1.5)),
        bias_(parameters(-1, 1)) {}

  void run() {
    const std::string op = settings_.text("op", "forward");
    const bool hook = settings_.is("hook", "relu");
    if (op.find("backward") != std::string::npos || op.find("grad") != std::string::npos)
      hook ? backward<ReluGradient>(op) : backward<NoHook>(op);
    else
      hook ? forward<ReluAfterSum>(op) : forward<NoHook>(op);
  }

 private:
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
      if (kind == "shifted") value += 1e4 * spread[c];
      if (kind == "outlier" && first) value += 1e6;
      if (kind == "constant") value = centre[c];
      if (kind == "huge") value *= 1e30;
      if (kind == "tiny") value *= 1e-30;
      if (kind == "nan" && c == 0 && i == g_.numel() - g_.stats * g_.inner) value = NAN;
      if (kind == "inf" && c == 0 && first) value = INFINITY;
      buffer[i] = narrow<T>(static_cast<A>(value));
    }
    return buffer;
  }

  Buffer<float> parameters(double from, double to) {
    Buffer<float> buffer(g_.stats);
    std::uniform_real_distribution<float> uniform(from, to);
    for (int64_t c = 0; c < g_.stats; ++c) buffer[c] = uniform(random_);
    return buffer;
  }

  static Channels<T> channels(const Buffer<float>& buffer) { return {buffer.data(), 1, true}; }

  // Sums over each channel of f(element).
  template <typename F>
  std::vector<double> sums(const F& f) const {
    std::vector<double> result(g_.stats);
    for (int64_t i = 0; i < g_.numel(); ++i) result[channel_of(i)] += f(i);
    return result;
  }

  struct Moments {
    std::vector<double> mean, m2;
  };
  Moments moments() const {
    Moments m{sums([&](int64_t i) { return static_cast<double>(widen(x_[i])); }), {}};
    for (double& mean : m.mean) mean /= static_cast<double>(g_.count());
    m.m2 = sums([&](int64_t i) { return std::pow(widen(x_[i]) - m.mean[channel_of(i)], 2); });
    return m;
  }

  template <typename Op>
  void launch(const Op& op, bool reduces, bool maps) {
    Request request{g_, sizeof(T), Op::kInputs, Op::kCoefficients, aligned_, reduces, maps};
    Device device;
    device.sms = static_cast<int>(settings_.number("sms", 4));
    device.shared_per_sm = device.shared_per_block = settings_.number("shared", 128 << 10);
    device.cooperative = settings_.number("cooperative", 1) != 0;
    const Plan plan = Planner(request, device, Override::from_text(Override::environment())).plan();
    const Scratch scratch = plan.scratch();
    if (!counters_) {
      counters_ = std::make_unique<Buffer<unsigned char>>(scratch.counter_bytes);
      scratch_ = std::make_unique<Buffer<unsigned char>>(scratch.bytes);
      std::fill_n(counters_->data(), scratch.counter_bytes, 0);
      const Shape& s = plan.first.shape;
      std::printf("rule=\"%s\" row=%d pack=%d ranks=%d teams=%d groups=%d width=%d relay=%d blocks=%ld\n", plan.rule,
                  plan.pattern == Pattern::kRow, plan.pack, s.ranks, s.teams, s.groups, s.width, s.relay,
                  static_cast<long>(plan.first.blocks() + (plan.policy == Policy::kSplit ? plan.second.blocks() : 0)));
    }
    emulator::poison(scratch_->data(), scratch.bytes);
    const Workspace workspace(counters_->data(), scratch_->data(), scratch);
    auto* const between = reinterpret_cast<double*>(scratch_->data() + scratch.between);
    cuda::run(plan, op, between, [&](Phase phase, const Launch& how, const Op& part) {
      with_kernel<Op>(phase, plan, [&](auto kernel) {
        emulator::launch({.grid = {static_cast<unsigned>(how.shape.teams), static_cast<unsigned>(how.shape.ranks)},
                          .block = kThreads,
                          .shared_bytes = static_cast<std::size_t>(how.shared_bytes),
                          .cooperative = phase == Phase::kFused && how.shape.ranks > 1,
                          .seed = static_cast<unsigned>(settings_.number("seed", 1))},
                         kernel, how.shape, part, workspace);
      });
    });
  }

  template <typename Hook>
  void forward(const std::string& op) {
    const int64_t c_count = g_.stats;
    const double n = static_cast<double>(g_.count()), eps = 1e-5;
    const bool cumulative = settings_.is("momentum", "none"), writes = op != "moments";
    Buffer<float> running_mean = parameters(-1, 1), running_var = parameters(0.5, 2);
    Buffer<double> stats(2 * c_count), sums_out(2 * c_count + 1), sums_in(2 * c_count + 1);
    Buffer<T> y(g_.numel(), aligned_);
    int64_t batches = 3;
    Forward<T, Hook> call{.x = x_.data(),
                          .y = writes ? y.data() : nullptr,
                          .extra = extra_.data(),
                          .channels = c_count,
                          .inner = g_.inner,
                          .source = Source::kBatch,
                          .count = n,
                          .eps = eps,
                          .momentum = cumulative ? NAN : 0.25,
                          .weight = channels(weight_),
                          .bias = channels(bias_),
                          .running_mean = channels(running_mean),
                          .running_var = channels(running_var),
                          .num_batches_tracked = &batches,
                          .sums = nullptr,
                          .sums_out = nullptr,
                          .stats = stats.data(),
                          .centred = true,
                          .hook = Hook()};
    Moments m = moments();
    const bool tracks = op == "forward" || op == "apply";
    if (op == "eval") call.source = Source::kRunning;
    if (op == "moments") call.sums_out = sums_out.data(), call.stats = nullptr;
    if (!tracks) call.num_batches_tracked = nullptr;
    if (op == "moments") call.running_mean = call.running_var = {};
    double total = n;
    if (op == "apply") {  // with the moments of a batch of twice the size
      total = 2 * n;
      for (int64_t c = 0; c < c_count; ++c) {
        m.mean[c] += 0.1, m.m2[c] = 2.2 * m.m2[c] + 0.1;
        sums_in[c] = total * m.mean[c];
        sums_in[c_count + c] = m.m2[c] + total * m.mean[c] * m.mean[c];
      }
      sums_in[2 * c_count] = total;
      call.source = Source::kSums;
      call.sums = sums_in.data();
    }
    for (int turn = 0; turn < 2; ++turn) {
      const std::vector<float> mean_before(running_mean.data(), running_mean.data() + c_count),
          var_before(running_var.data(), running_var.data() + c_count);
      y.clear(), stats.clear(), sums_out.clear();
      launch(call, op == "forward" || op == "moments", writes);
      const double factor = cumulative ? 1.0 / (4 + turn) : 0.25, rounding = 8 * kEpsilon<A>;
      if (tracks) check("num_batches_tracked", 0, static_cast<double>(batches), 4 + turn, 0);
      std::vector<double> mean(c_count), invstd(c_count);
      for (int64_t c = 0; c < c_count; ++c) {
        const double var = op == "eval" ? var_before[c] : m.m2[c] / total;
        mean[c] = op == "eval" ? mean_before[c] : m.mean[c];
        invstd[c] = 1 / std::sqrt(var + eps);
        const double std = std::sqrt(var + eps);
        if (op == "moments") {
          check("sums: n * mean", c, sums_out[c], n * mean[c], n * (rounding * std + 1e-15 * std::fabs(mean[c])));
          const double squares = m.m2[c] + n * mean[c] * mean[c];
          check("sums: squares", c, sums_out[c_count + c], squares,
                rounding * n * std * (std + 2 * std::fabs(mean[c])) + 1e-15 * squares);
          check("sums: n", c, sums_out[2 * c_count], n, 0);
          continue;
        }
        check("mean", c, stats[c], mean[c], rounding * std + 1e-15 * std::fabs(mean[c]));
        check("invstd", c, stats[c_count + c], invstd[c], rounding * invstd[c]);
        if (tracks) {
          const double unbiased = total > 1 ? m.m2[c] / (total - 1) : 0;
          check("running_mean", c, running_mean[c], (1 - factor) * mean_before[c] + factor * mean[c],
                rounding * std + 0x1p-23 * (std::fabs(mean[c]) + 1));
          check("running_var", c, running_var[c], static_cast<float>((1 - factor) * var_before[c] + factor * unbiased),
                2 * rounding * unbiased + 0x1p-22 * (var_before[c] + unbiased));
        }
      }
      for (int64_t i = 0; writes && i < g_.numel(); ++i) {
        const int64_t c = channel_of(i);
        const double xhat = (widen(x_[i]) - mean[c]) * invstd[c], scaled = xhat * weight_[c];
        double expected = scaled + bias_[c];
        double bound = rounding * (std::fabs(scaled) + 2);
        if (Hook::kExtra)
          expected = Hook()(expected, static_cast<double>(widen(extra_[i]))),
          bound += rounding * std::fabs(widen(extra_[i]));
        check("y", i, widen(y[i]), expected,
              bound + kEpsilon<T> * std::fabs(expected) + (sizeof(T) == 2 ? 0x1p-25 : 0));
      }
    }
  }

  template <typename Hook>
  void backward(const std::string& op) {
    const int64_t c_count = g_.stats;
    const bool training = op != "eval_backward", halves = op == "grad_moments" || op == "grad_apply";
    const bool maps = op != "sums_backward" && op != "grad_moments", reduces = op != "grad_apply";
    const double n = static_cast<double>(g_.count());
    Buffer<double> stats(2 * c_count), sums_out(2 * c_count), sums_in(2 * c_count), total(1);
    Buffer<float> dweight(c_count), dbias(c_count);
    Buffer<T> dx(g_.numel(), aligned_);
    const Moments m = moments();
    for (int64_t c = 0; c < c_count; ++c) {
      stats[c] = m.mean[c];
      stats[c_count + c] = 1 / std::sqrt(m.m2[c] / n + 1e-5);
    }
    const auto xhat = [&](int64_t i) { return (widen(x_[i]) - stats[channel_of(i)]) * stats[c_count + channel_of(i)]; };
    const auto dy = [&](int64_t i) {
      const double value = widen(dy_[i]);
      return Hook::kExtra ? Hook()(value, static_cast<double>(widen(extra_[i]))) : value;
    };
    std::vector<double> sum = sums(dy), dot = sums([&](int64_t i) { return dy(i) * xhat(i); });
    const std::vector<double> size = sums([&](int64_t i) { return std::fabs(dy(i)) * (std::fabs(xhat(i)) + 1); });
    Backward<T, Hook> call{.dy = dy_.data(),
                           .x = x_.data(),
                           .dx = maps ? dx.data() : nullptr,
                           .extra = extra_.data(),
                           .channels = c_count,
                           .training = training,
                           .count = n,
                           .total_count = nullptr,
                           .stats = stats.data(),
                           .weight = channels(weight_),
                           .dweight = {},
                           .dbias = {},
                           .sums = nullptr,
                           .sums_out = nullptr,
                           .hook = Hook()};
    if (!halves) call.dweight = channels(dweight), call.dbias = channels(dbias);
    if (op == "grad_moments") call.sums_out = sums_out.data();
    if (op == "grad_apply") {  // with the sums of a batch of twice the size
      for (int64_t c = 0; c < c_count; ++c)
        sums_in[c] = sum[c] = 2 * sum[c] + 1, sums_in[c_count + c] = dot[c] = 3 * dot[c];
      total[0] = 2 * n;
      call.sums = sums_in.data();
      call.total_count = total.data();
    }
    const double rounding = 4 * kEpsilon<A> * std::sqrt(16 + n / 64);
    for (int turn = 0; turn < 2; ++turn) {
      dx.clear(), dweight.clear(), dbias.clear(), sums_out.clear();
      launch(call, reduces, maps);
      for (int64_t c = 0; c < c_count; ++c) {
        if (op == "grad_moments") {
          check("sums: dy", c, sums_out[c], sum[c], rounding * size[c]);
          check("sums: dy * xhat", c, sums_out[c_count + c], dot[c], rounding * size[c]);
        } else if (!halves) {
          check("dbias", c, dbias[c], sum[c], (rounding + 0x1p-24) * size[c]);
          check("dweight", c, dweight[c], dot[c], (rounding + 0x1p-24) * size[c]);
        }
      }
      const double over = op == "grad_apply" ? total[0] : n;
      for (int64_t i = 0; maps && i < g_.numel(); ++i) {
        const int64_t c = channel_of(i);
        const double average = training ? sum[c] / over + xhat(i) * dot[c] / over : 0,
                     scale = weight_[c] * stats[c_count + c];
        const double expected = scale * (dy(i) - average);
        const double terms = scale * (std::fabs(dy(i)) + size[c] / over * (1 + std::fabs(xhat(i))));
        check("dx", i, widen(dx[i]), expected,
              2 * rounding * terms + kEpsilon<T> * std::fabs(expected) + (sizeof(T) == 2 ? 0x1p-25 : 0));
      }
    }
  }

  Settings settings_;
  Geometry g_;
  bool aligned_;
  std::mt19937 random_;
  Buffer<T> x_, dy_, extra_;
  Buffer<float> weight_, bias_;
  std::unique_ptr<Buffer<unsigned char>> counters_, scratch_;
};

}  // namespace

int main(int count, char** arguments) {
  Settings settings;
  for (int i = 1; i < count; ++i) {
    const std::string argument = arguments[i];
    const auto equals = argument.find('=');
    settings.values[argument.substr(0, equals)] = argument.substr(equals + 1);
  }
  const std::string dtype = settings.text("dtype", "f32");
  if (dtype == "f32") Test<float>(settings).run();
  if (dtype == "f64") Test<double>(settings).run();
  if (dtype == "f16") Test<__half>(settings).run();
  if (dtype == "bf16") Test<__nv_bfloat16>(settings).run();
  return failed;
}
