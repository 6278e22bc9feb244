// Which thread does what, and when. A pattern cuts the tensor into blocks of cells and each block into chunks; the
// cuts and the order in which chunks are merged depend on the shape alone, so the number of threads changes nothing in
// the result, only whether a block is reduced and mapped by one thread while it is in that thread's cache, or chunk by
// chunk by all of them.
#pragma once

#include <ATen/Parallel.h>
#include <c10/util/FunctionRef.h>

#include <algorithm>
#include <bit>
#include <cstddef>
#include <cstdint>
#include <memory>

#include "scratch.h"
#include "vec.h"

namespace batchnorm_ext::cpu {

// Cuts `total` into shares of at most `most`, and gives their size. Their number is a power of two or a multiple of
// eight, which the usual numbers of threads divide.
inline int64_t even_share(int64_t total, int64_t most) {
  const auto n = static_cast<uint64_t>((total + most - 1) / most);
  const auto shares = static_cast<int64_t>(n < 8 ? std::bit_ceil(n) : (n + 7) / 8 * 8);
  return std::max<int64_t>(1, (total + shares - 1) / shares);
}

// Work that is not worth waking another thread for.
constexpr int64_t kGrainElements = 32768;

// f(begin, end) for shares of [0, n) on all threads. What a thread has streamed is in memory when it is done. There
// is one fence for each share: it waits for the writes, which costs time after each of many short runs.
template <typename F>
void parallel(int64_t n, int64_t grain, const F& f) {
  at::parallel_for(0, n, grain, [&](int64_t begin, int64_t end) {
    f(begin, end);
    stream_fence();
  });
}

struct Schedule {
  int64_t blocks, chunks, cells, per_stat, grain;  // grain: in chunks
  bool whole_blocks;                               // a thread takes whole blocks

  template <typename Pattern>
  explicit Schedule(const Pattern& pattern)
      : blocks(pattern.blocks()),
        chunks(pattern.chunks()),
        cells(pattern.geometry().cells()),
        per_stat(pattern.geometry().per_stat) {
    grain = std::max<int64_t>(1, kGrainElements * blocks * chunks / std::max<int64_t>(1, pattern.geometry().numel()));
    const int64_t threads = at::get_num_threads();
    const int64_t busiest = (blocks + threads - 1) / threads * threads;  // blocks of the busiest thread, times threads
    whole_blocks = chunks == 1 || threads == 1 || (busiest - blocks) * 4 <= blocks;
  }
};

// The steps of a pass, as references to functions: a step is called once for each chunk, which costs little, and a pass
// is compiled once for all steps.
//
// reduce(block, chunk, a, b, scratch)  writes two numbers per cell of the block
// merge(n, n2, width, a, b, a2, b2)    merges into the totals of n elements per cell those of the next n2
// finish(first, width, a, b)           takes the totals of cells [first, first + width), all those of some statistics,
//                                      and may overwrite them
// map(block, chunk, scratch)           may use what finish left
using Reduce = c10::function_ref<void(int64_t, int64_t, double*, double*, Scratch&)>;
using Merge = c10::function_ref<void(double, double, int64_t, double*, double*, const double*, const double*)>;
using Finish = c10::function_ref<void(int64_t, int64_t, double*, double*)>;
using Map = c10::function_ref<void(int64_t, int64_t, Scratch&)>;

constexpr std::nullptr_t kNoMap = nullptr;

template <typename Pattern>
void reduce_then_map(const Pattern& pattern, const Schedule& schedule, Reduce reduce, Merge merge, Finish finish,
                     Map map) {
  const auto [blocks, chunks, cells, per_stat, grain, whole_blocks] = schedule;
  if (whole_blocks) {
    parallel(blocks, std::max<int64_t>(1, grain / chunks), [&](int64_t begin, int64_t end) {
      Scratch scratch;
      const int64_t capacity = pattern.width(0);
      std::unique_ptr<double[]> buffer(new double[4 * capacity]);
      double *a = buffer.get(), *b = a + capacity, *a2 = b + capacity, *b2 = a2 + capacity;
      for (int64_t block = begin; block < end; ++block) {
        const int64_t width = pattern.width(block);
        reduce(block, 0, a, b, scratch);
        double n = pattern.count(0);
        for (int64_t chunk = 1; chunk < chunks; n += pattern.count(chunk++)) {
          reduce(block, chunk, a2, b2, scratch);
          merge(n, pattern.count(chunk), width, a, b, a2, b2);
        }
        finish(pattern.first(block), width, a, b);
        // backwards: the end is in the cache
        for (int64_t chunk = map ? chunks : 0; chunk-- > 0;) map(block, chunk, scratch);
      }
    });
    return;
  }
  // Every task is one chunk. Row 2 * chunk of `parts` holds a, the row after it b, one value per cell.
  std::unique_ptr<double[]> parts(new double[2 * chunks * cells]);
  const auto part = [&](int64_t chunk, int64_t cell) { return parts.get() + 2 * chunk * cells + cell; };
  parallel(blocks * chunks, grain, [&](int64_t begin, int64_t end) {
    Scratch scratch;
    for (int64_t task = begin; task < end; ++task) {
      const int64_t block = task / chunks, chunk = task % chunks;
      double* a = part(chunk, pattern.first(block));
      reduce(block, chunk, a, a + cells, scratch);
    }
  });
  parallel(cells / per_stat, std::max<int64_t>(1, 4096 / chunks / per_stat), [&](int64_t from, int64_t to) {
    const int64_t begin = from * per_stat, end = to * per_stat;
    double* a = part(0, begin);
    double n = pattern.count(0);
    for (int64_t chunk = 1; chunk < chunks; n += pattern.count(chunk++)) {
      const double* a2 = part(chunk, begin);
      merge(n, pattern.count(chunk), end - begin, a, a + cells, a2, a2 + cells);
    }
    finish(begin, end - begin, a, a + cells);
  });
  if (map)
    parallel(blocks * chunks, grain, [&](int64_t begin, int64_t end) {
      Scratch scratch;
      for (int64_t task = end; task-- > begin;) map(task / chunks, task % chunks, scratch);
    });
}

// Every chunk on its own, for maps that need no reduction: in the order of memory, as far as the pattern can.
inline void map_all(const Schedule& schedule, Map map) {
  parallel(schedule.blocks * schedule.chunks, schedule.grain, [&](int64_t begin, int64_t end) {
    Scratch scratch;
    for (int64_t task = begin; task < end; ++task) map(task % schedule.blocks, task / schedule.blocks, scratch);
  });
}

}  // namespace batchnorm_ext::cpu
