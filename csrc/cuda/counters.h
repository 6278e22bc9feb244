// Which counters a launch gets. They are zero, up to the top bit, before a launch and after it (team.cuh), so that the
// next owner need not reset them. This file calls nothing of CUDA, so that its tests need no GPU.
#pragma once

#include <algorithm>
#include <bit>
#include <compare>
#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <set>
#include <tuple>

namespace batchnorm_ext::cuda {

constexpr int64_t kLeastCounterBytes = 64 << 10;  // enough for every block of today's GPUs to lead a team

// Launches that cannot run concurrently and so may share counters: all eager launches on one stream, or all launches on
// it that one capture has recorded (the graph may be replayed while the stream is busy). PyTorch's caching allocator
// relies on the same order when it reuses memory. The body of a conditional node is a capture of its own.
struct Queue {
  int device;
  void* stream;
  std::optional<unsigned long long> capture;  // its id, which is never used again

  auto operator<=>(const Queue&) const = default;
};

class CounterPool {
 public:
  struct Block {
    void* memory = nullptr;
    int64_t bytes = 0;
  };

  // A graph holds it as long as launches that it has captured may run. Returns the counters to the pool when destroyed.
  class Lease {
   public:
    Lease(CounterPool& pool, const Queue& queue, const Block& block) : pool_(pool), queue_(queue), block_(block) {}
    Lease(const Lease&) = delete;
    ~Lease() { pool_.give_back(queue_, block_); }

   private:
    CounterPool& pool_;
    Queue queue_;
    Block block_;
  };

  // At least `bytes` for the launches of a queue: what it has, what was given back, or else allocate(bytes), which is
  // to be zero. Where the queue is captured, hold() gets the lease, which may end at any time and in any thread.
  template <typename Allocate, typename Hold>
  void* counters(const Queue& queue, int64_t bytes, const Allocate& allocate, const Hold& hold) {
    if (void* const memory = find(queue, bytes)) return memory;
    // Launches may still use the counters that a queue outgrows: they are abandoned. Sizes are powers of two, so that
    // all that is abandoned is less than what the queue has.
    bytes = std::max(kLeastCounterBytes, static_cast<int64_t>(std::bit_ceil(static_cast<uint64_t>(bytes))));
    Block block = take(queue.device, bytes);
    if (block.memory == nullptr) block = {allocate(bytes), bytes};
    if (queue.capture) hold(std::make_unique<Lease>(*this, queue, block));
    assign(queue, block);
    return block.memory;
  }

 private:
  // No caller's function runs while the mutex is held: CUDA may end a lease while it holds locks of its own.
  void* find(const Queue& queue, int64_t bytes) {
    const std::lock_guard<std::mutex> lock(mutex_);
    const auto found = assigned_.find(queue);
    return found != assigned_.end() && found->second.bytes >= bytes ? found->second.memory : nullptr;
  }

  void assign(const Queue& queue, const Block& block) {
    const std::lock_guard<std::mutex> lock(mutex_);
    assigned_[queue] = block;
  }

  // The smallest block that will do, or none.
  Block take(int device, int64_t bytes) {
    const std::lock_guard<std::mutex> lock(mutex_);
    const auto found = free_.lower_bound({device, bytes, nullptr});
    if (found == free_.end() || std::get<0>(*found) != device) return {};
    const Block block{std::get<2>(*found), std::get<1>(*found)};
    free_.erase(found);
    return block;
  }

  void give_back(const Queue& queue, const Block& block) {
    const std::lock_guard<std::mutex> lock(mutex_);
    free_.emplace(queue.device, block.bytes, block.memory);
    assigned_.erase(queue);
  }

  std::mutex mutex_;
  std::map<Queue, Block> assigned_;
  std::set<std::tuple<int, int64_t, void*>> free_;  // device, bytes, memory
};

}  // namespace batchnorm_ext::cuda
