// A ReLU's backward that keeps the gradient of z while it sums, against the backward without an activation of a dy that
// was zeroed where z <= 0: the same bits.
//
//   activated "300x40x1"      the shapes that have this in their name: all by default
#include <algorithm>
#include <array>
#include <cstdint>
#include <string>
#include <type_traits>
#include <utility>

#include "checks.h"
#include "cpu/maps.h"
#include "cpu/passes.h"
#include "problem.h"

namespace {

using namespace batchnorm_ext;
using namespace batchnorm_ext::cpu;
using Element = BATCHNORM_EXT_ELEMENT;

// [outer, channels, inner], and batch: as those of kernels.cpp, without what differs in the reduction alone
constexpr Geometry kShapes[] = {{1, 2, 40001}, {95, 4, 600},  {5, 3, 257},    {3, 7, 49},
                                {20, 3, 45},   {2, 3, 5},     {40, 200, 1},   {9, 3, 1},
                                {333, 40, 1},  {5001, 64, 1}, {261, 1999, 1}, {100, 9, 49},
                                {35, 70, 36},  {1, 7, 49, 5}, {3, 5, 300, 2}, {333, 13, 1, 3}};

template <typename T>
struct Results {
  explicit Results(const Geometry& g) : dbias(g.cells()), dweight(g.cells()), dx(g.numel(), 5) {}
  Buffer<double> dbias, dweight;
  Buffer<T> dx;
};

template <typename T>
class Test {
  using A = Acc<T>;
  using Act = InlinedActivation<A, OfOutput<A>, Relu<VectorMath<A>>>;

 public:
  Test(const Geometry& geometry, Checks checks)
      : g_(geometry),
        p_(geometry, Data::kNormal),
        checks_(std::move(checks)),
        of_z_(g_.cells()),
        of_dx_(g_.cells()),
        z_(g_.numel(), 1),
        cut_(g_.numel(), 3) {
    set_normalize(of_z_, 0, g_.cells(), p_.mean.data(), p_.invstd.data(), p_.weight.data(), p_.bias.data());
    for (int64_t c = 0; c < g_.cells(); ++c) of_dx_.row(0)[c] = static_cast<A>(p_.mean[c]);
    for (int64_t i = 0; i < g_.numel(); ++i) {
      z_[i] = static_cast<T>(z(i));
      cut_[i] = z(i) > 0 ? p_.dy[i] : T(0);
    }
  }

  void run() {
    if (has_long_runs(g_) && !std::is_same_v<T, A>) return;  // keeps nothing
    for (const int threads : {1, 3}) {
      at::num_threads = threads;
      const Results<T> expected(g_), in_place(g_), residual(g_);
      const Buffer<T> dresidual(g_.numel(), 2);
      fill(expected, PlainGrad(), cut_, cut_);
      fill(in_place, kept_by<OfInput<A>>(in_place.dx), p_.dy, in_place.dx);
      fill(residual, kept_by<OfOutput<A>>(dresidual), p_.dy, dresidual, static_cast<const T*>(z_.data()));
      check(in_place, expected);
      check(residual, expected);
      checks_.same("dresidual", dresidual, cut_);
    }
  }

 private:
  // By the kernels' arithmetic: the sign must be theirs.
  A z(int64_t i) const {
    Coefficients<A, 3> c;
    for (int k = 0; k < 3; ++k) c[k] = Vec<A>(of_z_.view()[k][p_.cell_of(i)]);
    A lanes[Vec<A>::size()];
    OfInput<A>::z(c, 0, Vec<A>(static_cast<A>(p_.x[i]))).store(lanes);
    return lanes[0];
  }

  template <typename Z>
  ActivatedGrad<Z, Act, T> kept_by(const Buffer<T>& kept) const {
    return {{}, of_z_.view(), p_.dy.data(), {kept.data(), true}};
  }

  // The sums by `grad` of dy and `more`, then the map of g.
  template <typename Grad, typename... More>
  void fill(const Results<T>& results, const Grad& grad, const Buffer<T>& dy, const Buffer<T>& g, const More*... more) {
    with_pattern<T>(g_, [&](const auto& pattern) {
      const auto finish = [&](int64_t first, int64_t width, const double* dbias, const double* dweight) {
        std::copy_n(dbias, width, &results.dbias[first]);
        std::copy_n(dweight, width, &results.dweight[first]);
        set_normalize_grad(of_dx_, first, width, dbias, dweight, static_cast<double>(g_.count()), p_.mean.data(),
                           p_.invstd.data(), p_.weight.data());
      };
      const auto map = [&](int64_t block, int64_t chunk, Scratch& scratch) {
        pattern.template map<false>(block, chunk, NormalizeGrad<A>(), of_dx_.view(), scratch,
                                    std::array{results.dx.data()}, static_cast<const T*>(g.data()), p_.x.data());
      };
      reduce_grads(pattern, grad, Centres<A>{of_dx_.row(0), p_.mean.data(), p_.invstd.data()}, finish, map,
                   static_cast<const T*>(dy.data()), static_cast<const T*>(p_.x.data()), more...);
    });
  }

  void check(const Results<T>& actual, const Results<T>& expected) const {
    checks_.same("dbias", actual.dbias, expected.dbias);
    checks_.same("dweight", actual.dweight, expected.dweight);
    checks_.same("dx", actual.dx, expected.dx);
  }

  Geometry g_;
  Problem<T> p_;
  Checks checks_;
  CoefficientTable<A, 3> of_z_;
  CoefficientTable<A, 4> of_dx_;
  Buffer<T> z_, cut_;
};

}  // namespace

int main(int count, char** arguments) {
  const std::string filter = count > 1 ? arguments[1] : "";
  for (const Geometry& g : kShapes) {
    const std::string name = std::to_string(g.outer) + "x" + std::to_string(g.channels) + "x" + std::to_string(g.inner);
    if (name.find(filter) != std::string::npos) Test<Element>(g, Checks(name)).run();
  }
  return 0;
}
