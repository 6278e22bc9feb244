// Host side: how a tensor is cut up for a GPU. The rules that choose the policy are the table that follows the
// constants.
#pragma once

#include <algorithm>
#include <cstdint>
#include <iterator>
#include <string>

#include "plan.h"

namespace batchnorm_ext::cuda {

constexpr int64_t kSegmentBytes = 128;             // the least to touch in a row, the longest run taken as a column
constexpr int64_t kMapSegmentBytes = 4 << 10;      // the same of a launch that only maps: a pack for each thread
constexpr int64_t kMostWidth = 256;                // channels of a group in columns
constexpr int64_t kLeastChunkBytes = 8 << 10;      // below it the barrier costs more than the chunk
constexpr int64_t kMapChunkBytes = 64 << 10;       // for a launch that only maps
constexpr int64_t kReduceChunkBytes = 512 << 10;   // for a launch that only reduces
constexpr int64_t kReserved = 1 << 10;             // of shared memory, by the system, for every block
constexpr int64_t kRoundBytes = 128 << 10;         // that a block could move while its team meets: 13 us on an H200
constexpr int64_t kStagger = 3000;                 // nanoseconds: 5 to 10% faster on an H200 where a team is a row's
constexpr int64_t kRelaySums = 2048;               // sums of other ranks that a block still adds up for itself
constexpr int64_t kMostBlocks = int64_t{1} << 30;  // of a launch

// What the rules look at. least_ranks: blocks it takes to keep a group; resident: blocks on the chip at once.
struct Facts {
  Device device;
  int64_t groups, group_bytes, least_ranks, resident;

  int64_t bytes() const { return groups * group_bytes; }
  bool one_block() const { return least_ranks == 1; }
};

struct Rule {
  const char* name;
  Policy policy;
  bool (*holds)(const Facts&);
};

// The dispatch table for what reduces and maps: the first rule that holds decides.
inline constexpr Rule kRules[] = {
    {"small group", Policy::kBlock,
     [](const Facts& f) { return f.one_block() && f.group_bytes <= 2 * kLeastChunkBytes; }},
    {"enough groups", Policy::kBlock, [](const Facts& f) { return f.one_block() && f.groups * 4 >= f.resident * 3; }},
    {"no cooperative launch", Policy::kSplit, [](const Facts& f) { return !f.device.cooperative; }},
    {"held by a large L2", Policy::kSplit,
     [](const Facts& f) { return f.device.architecture == 89 && f.bytes() * 5 <= f.device.l2 * 4; }},
    {"group fits the chip", Policy::kGrid, [](const Facts& f) { return f.least_ranks <= f.resident; }},
    {"group exceeds the chip", Policy::kGrid, [](const Facts&) { return true; }},
};

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

class Planner {
 public:
  Planner(const Request& request, const Device& device, const Override& override)
      : request_(request), device_(device), override_(override) {
    const int64_t margin = override_.margin.value_or(0);
    if (margin >= device_.sms)
      Override::reject("margin to be less than the multiprocessors of the device, " + std::to_string(device_.sms),
                       std::to_string(margin));
    device_.sms -= static_cast<int>(margin);
  }

  Plan plan() {
    choose_pattern();
    plan_launches();
    // Wider groups are fewer, and so are the meetings of their teams; but each meeting is about more sums.
    if (plan_.policy != Policy::kGrid || row() || override_.width) return plan_;
    Planner best = *this;
    while (set_width(2 * shape_.width)) {
      plan_launches();
      const int64_t wider = cost(plan_.first.shape), least = best.cost(best.plan_.first.shape);
      if (plan_.policy == Policy::kGrid && wider * 10 < least * 9) best = *this;
    }
    return best.plan_;
  }

 private:
  void plan_launches() {
    lay_out();
    choose_policy();
    if (plan_.policy == Policy::kSplit) {
      plan_.first = launch(Policy::kReduce);
      plan_.second = launch(Policy::kMap);
    } else {
      plan_.first = launch(plan_.policy);
    }
  }

  bool row() const { return plan_.pattern == Pattern::kRow; }
  int64_t pack_bytes() const { return int64_t{plan_.pack} * request_.element_bytes; }

  // Long runs are taken a channel at a time. Short ones, and those that no pack divides, across as many channels as
  // make a whole number of packs and a whole segment, if a block has the threads for it.
  void choose_pattern() {
    const Geometry& g = request_.geometry;
    const int64_t size = request_.element_bytes, full = 16 / size;
    const bool packs = request_.aligned && g.channels * g.inner % full == 0;
    plan_.pack = static_cast<int>(packs ? full : 1);
    unit_ = 1;
    while (unit_ * g.inner % plan_.pack != 0) unit_ *= 2;
    const int64_t segment = request_.reduces ? kSegmentBytes : kMapSegmentBytes;
    const bool long_runs = g.inner * size * (request_.reduces ? 1 : 2) > segment - 1;
    plan_.pattern = long_runs && unit_ == 1 ? Pattern::kRow : Pattern::kColumn;
    if (!row() && columns(unit_) > kThreads) {
      plan_.pattern = Pattern::kRow;
      if (unit_ > 1) plan_.pack = 1;
    }
    shape_.geometry = g;
    shape_.stride = g.channels * g.inner;
    set_width(row() ? 1 : override_.width.value_or(ceil_div(segment, g.inner * size)));
  }

  int64_t columns(int64_t width) const { return ceil_div(width * request_.geometry.inner, plan_.pack); }

  // As near to the width that is wanted as packs, channels and threads allow. False if that changes nothing.
  bool set_width(int64_t wanted) {
    const Geometry& g = request_.geometry;
    const int64_t before = shape_.width;
    int64_t width = 1;
    if (!row()) {
      width = std::min(ceil_div(std::min(wanted, kMostWidth), unit_), ceil_div(g.channels, unit_)) * unit_;
      while (width > unit_ && columns(width) > kThreads) width -= unit_;
    }
    shape_.width = static_cast<int32_t>(width);
    shape_.columns = Divider(row() ? 1 : columns(width));
    shape_.rows_at_once = Divider(row() ? 1 : kThreads / columns(width));
    shape_.outputs = Divider(shape_.columns.divisor * std::min(plan_.pack, kPassLanes));
    shape_.splits = std::max<int32_t>(1, kThreads / shape_.outputs.divisor);
    shape_.groups_per_sample = static_cast<int32_t>(ceil_div(g.channels, width));
    shape_.groups = static_cast<int32_t>(g.batch * shape_.groups_per_sample);
    shape_.run = Divider(row() ? g.inner / plan_.pack : 1);
    shape_.inner = Divider(row() ? 1 : g.inner);
    shape_.entry_bits = thread_bits(row() ? kWarps : g.inner, width);
    return width != before;
  }

  // As many threads for each channel as there are numbers to add up, rounded up to a power of two, but at most a warp,
  // and no more than there are for all channels at once.
  static int32_t thread_bits(int64_t count, int64_t channels) {
    int32_t bits = 0;
    while ((1 << bits) < count && (1 << bits) < kWarp && channels << (bits + 1) <= kThreads) ++bits;
    return bits;
  }

  void lay_out() {
    const int64_t acc = request_.element_bytes == 8 ? 8 : 4, lanes = shape_.columns.divisor * plan_.pack;
    const int64_t pass = std::min(plan_.pack, kPassLanes);
    int64_t end = 0;
    const auto place = [&](int64_t bytes) {
      const int64_t begin = end;
      end = begin + ceil_div(bytes, 16) * 16;
      return static_cast<int32_t>(begin);
    };
    Layout& l = shape_.layout;
    l.totals = place(request_.reduces ? 16 * shape_.width : 0);
    l.origins = place(request_.reduces ? 8 * shape_.width : 0);
    l.coefficients = place(request_.coefficients * acc * shape_.width);
    if (request_.reduces) {
      const int64_t entries = row() ? kWarps : lanes;
      l.sums = place(row() ? 0 : 2 * acc * kThreads * pass);
      l.parts = place(row() ? 0 : 2 * acc * std::max<int64_t>(kThreads, shape_.columns.divisor * pass));
      l.entries = place(2 * acc * entries);
      l.centre = place(acc * entries);
      l.flag = place(sizeof(int));
    }
    l.kept = place(0);
  }

  // What is cut into chunks: packs of a group in a row, rows of the tensor in a column.
  int64_t total() const {
    const Geometry& g = request_.geometry;
    return row() ? g.outer * (g.inner / plan_.pack) : g.outer;
  }
  int64_t taken_in_a_step() const { return row() ? kThreads : shape_.rows_at_once.divisor; }
  int64_t kept(int64_t steps) const {
    const int64_t batch = kLoads / request_.kept_inputs;
    return steps <= most_kept_ ? steps : most_kept_ / batch * batch;
  }
  int64_t step_bytes() const { return kThreads * pack_bytes() * request_.kept_inputs; }

  void choose_policy() {
    const int64_t room = std::min(device_.shared_per_sm / kBlocksPerSm - kReserved, device_.shared_per_block);
    most_kept_ = std::max<int64_t>(0, room - shape_.layout.kept) / step_bytes();
    const int64_t most = most_kept_ * taken_in_a_step();
    facts_ = {device_, shape_.groups, total() * pack_bytes() * shape_.columns.divisor,
              most > 0 ? ceil_div(total(), most) : INT64_MAX, int64_t{kBlocksPerSm} * device_.sms};
    if (!request_.reduces || !request_.maps) {
      plan_.policy = request_.reduces ? Policy::kReduce : Policy::kMap;
      plan_.rule = request_.reduces ? "reduction alone" : "map alone";
      return;
    }
    const Rule* rule =
        std::find_if(std::begin(kRules), std::end(kRules), [&](const Rule& r) { return r.holds(facts_); });
    plan_.policy = rule->policy;
    plan_.rule = rule->name;
    const bool possible = override_.policy == Policy::kSplit ||
                          (override_.policy == Policy::kBlock && facts_.one_block()) ||
                          (override_.policy == Policy::kGrid && device_.cooperative);
    if (!possible) return;
    plan_.policy = *override_.policy;
    plan_.rule = "override";
  }

  static int64_t rounds(const Shape& s) { return ceil_div(s.groups, s.teams); }

  // What a block moves for its team's groups, in bytes, with what it could move while the team meets.
  int64_t cost(const Shape& s) const {
    const int64_t bytes = pack_bytes() * s.columns.divisor, kept = s.kept * taken_in_a_step();
    const int64_t again = std::max<int64_t>(0, s.chunk - kept);
    return rounds(s) * ((s.chunk + (s.chunk + again) * request_.kept_inputs) * bytes + kRoundBytes);
  }

  // Teams of few blocks finish their groups in few rounds; teams of many leave blocks of the chip without a team. The
  // fewest ranks within 3% of the best time are taken: their barrier is the cheapest.
  int64_t grid_ranks() const {
    const int64_t least = std::min(facts_.least_ranks, facts_.resident);
    const int64_t most = std::clamp(facts_.group_bytes / kLeastChunkBytes, least, facts_.resident);
    const auto time = [&](int64_t ranks) {
      Shape s = shape_;
      s.teams = static_cast<int32_t>(std::min(facts_.groups, facts_.resident / ranks));
      s.chunk = ceil_div(total(), ranks);
      s.kept = static_cast<int32_t>(kept(ceil_div(s.chunk, taken_in_a_step())));
      return cost(s);
    };
    int64_t best = time(least);
    for (int64_t ranks = least + 1; ranks <= most; ++ranks) best = std::min(best, time(ranks));
    int64_t ranks = least;
    while (time(ranks) * 100 > best * 103) ++ranks;
    return ranks;
  }

  // As many as chunks of the given size make, and enough for the chip as long as each has something to do.
  int64_t free_ranks(int64_t chunk_bytes) const {
    const int64_t for_the_chip =
        std::min(ceil_div(facts_.resident, facts_.groups), facts_.group_bytes / kLeastChunkBytes);
    return std::max(ceil_div(facts_.group_bytes, chunk_bytes), for_the_chip);
  }

  Launch launch(Policy policy) const {
    const bool block = policy == Policy::kBlock, grid = policy == Policy::kGrid;
    int64_t ranks = block                       ? 1
                    : grid                      ? grid_ranks()
                    : policy == Policy::kReduce ? free_ranks(kReduceChunkBytes)
                                                : free_ranks(kMapChunkBytes);
    if (!block) ranks = override_.ranks.value_or(ranks);
    if (grid) ranks = std::min(ranks, facts_.resident);
    ranks = std::clamp<int64_t>(ranks, ceil_div(total() * shape_.columns.divisor * plan_.pack, kMostElements), total());
    ranks = std::min(ranks, kMostRanks);
    if (!grid) ranks = std::min(ranks, std::max<int64_t>(1, kMostBlocks / shape_.groups));
    Shape s = shape_;
    s.chunk = ceil_div(total(), ranks);
    s.ranks = static_cast<int32_t>(ceil_div(total(), s.chunk));
    const int64_t teams = grid ? std::min<int64_t>(s.groups, facts_.resident / s.ranks) : s.groups;
    s.teams = static_cast<int32_t>(std::min(teams, kMostBlocks / s.ranks));
    s.relay = grid && int64_t{s.ranks} * s.width > override_.relay.value_or(kRelaySums);
    s.rank_bits = thread_bits(s.ranks, s.relay ? ceil_div(s.width, s.ranks) : s.width);
    if (grid && rounds(s) > 2) s.stagger = static_cast<int32_t>(override_.stagger.value_or(kStagger));
    if (block || grid) s.kept = static_cast<int32_t>(kept(ceil_div(s.chunk, taken_in_a_step())));
    return {s, s.layout.kept + s.kept * step_bytes()};
  }

  Request request_;
  Device device_;
  Override override_;
  Facts facts_{};
  int64_t unit_ = 1;       // channels that make whole packs together
  int64_t most_kept_ = 0;  // steps, in the shared memory of a block
  Shape shape_{};
  Plan plan_{};
};

}  // namespace batchnorm_ext::cuda
