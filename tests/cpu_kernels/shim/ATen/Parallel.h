// at::parallel_for as the kernels use it, with threads that ThreadSanitizer understands, which it does not those of
// OpenMP. The tasks are cut as PyTorch cuts them.
#pragma once

#include <algorithm>
#include <cstdint>
#include <thread>
#include <vector>

namespace at {

inline int num_threads = 1;

inline int get_num_threads() { return num_threads; }

template <typename F>
void parallel_for(int64_t begin, int64_t end, int64_t grain, const F& f) {
  if (begin >= end) return;
  const int64_t tasks = std::min<int64_t>(num_threads, (end - begin + grain - 1) / grain);
  const int64_t share = (end - begin + tasks - 1) / tasks;
  std::vector<std::thread> others;
  for (int64_t first = begin + share; first < end; first += share)
    others.emplace_back([&f, first, last = std::min(end, first + share)] { f(first, last); });
  f(begin, std::min(end, begin + share));
  for (std::thread& thread : others) thread.join();
}

}  // namespace at
