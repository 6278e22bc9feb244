// Runs the threads of a grid as fibers, one at a time. Whenever a thread waits, a seeded random choice among all
// threads that can go on takes over, so that blocks and warps interleave in every way that their barriers allow.
//
// To ThreadSanitizer every CUDA thread is a thread of its own. A switch orders nothing; what orders the threads are the
// barriers, the warp collectives and the atomics of the kernel, and the start and the end of the launch.
// Whatever runs on a fiber here is therefore hidden from ThreadSanitizer: its accesses are not the kernel's.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <source_location>
#include <utility>
#include <vector>

#include "fiber.h"
#include "grid.h"
#include "misuse.h"
#include "sanitizers.h"

namespace emulator {

constexpr std::size_t kSharedAlignment = 128;

// 0xFF bytes: NaN in every floating-point format.
inline void poison(void* memory, std::size_t bytes) {
  if (bytes) std::memset(memory, 0xFF, bytes);
}

class Random {
 public:
  explicit Random(std::uint64_t seed) : state_(seed) {}
  // In [0, n).
  [[gnu::no_sanitize("thread")]] std::size_t below(std::size_t n) {
    state_ += 0x9e3779b97f4a7c15u;  // SplitMix64
    std::uint64_t z = state_;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return static_cast<std::size_t>(((z ^ (z >> 31)) >> 32) * n >> 32);
  }

 private:
  std::uint64_t state_;
};

class Scheduler {
  using Entry = void (*)(void* kernel);

 public:
  // On the host.

  void run(const Launch& launch, Entry entry, void* kernel) {
    check_launch(launch, current_ != nullptr);
    const sanitizers::IgnoreAccesses ignore;
    begin(launch, entry, kernel);
    const std::vector<std::size_t> order = random_order(count(gridDim));
    const std::size_t most = launch.cooperative ? order.size() : 1 + random_.below(kMostResident);
    std::vector<Thread*> ready(most * count(blockDim));
    ready_ = ready.data();
    for (std::size_t next = 0; next < order.size() || !resident_.empty();) {
      while (next < order.size() && resident_.size() < most) admit(order[next++]);
      resume(host_, *pick(), false);
      retire(*current_->block);  // the host has its turn when a block is through
    }
    current_ = nullptr;
    fibers_.end_launch();
    sanitizers::acquire(&end_edge_);
  }

  // On a thread of the kernel. Not inlined, or they would be seen by ThreadSanitizer as parts of their callers.

  [[gnu::no_sanitize("thread"), gnu::noinline]] void* shared() { return current_->block->shared; }
  [[gnu::no_sanitize("thread"), gnu::noinline]] unsigned lane() { return current_->lane; }

  // Lets the other threads run. `progress`: not one of a loop's many attempts.
  [[gnu::no_sanitize("thread"), gnu::noinline]] void yield(bool progress) {
    idle_ = progress ? 0 : idle_ + 1;
    ready_[ready_count_++] = current_;
    if (idle_ > kMostIdle + kIdlePerThread * ready_count_) livelock();
    switch_away();
  }

  [[gnu::no_sanitize("thread"), gnu::noinline]] void sync_block(const std::source_location& site) {
    wait(current_->block->barrier, site);
  }

  [[gnu::no_sanitize("thread"), gnu::noinline]] void sync_warp(unsigned mask, const std::source_location& site) {
    if (mask != kFullMask) fail(site, "a warp collective with the mask 0x%08x: only full masks are supported", mask);
    wait(current_->warp->barrier, site);
  }

  // The values of all lanes, until this thread's next collective but one.
  [[gnu::no_sanitize("thread"), gnu::noinline]] const std::uint64_t* gather(std::uint64_t value, unsigned mask,
                                                                            const std::source_location& site) {
    Thread& self = *current_;
    std::uint64_t* values = self.warp->values[self.collectives++ % 2];
    values[self.lane] = value;
    sync_warp(mask, site);
    return values;
  }

  [[gnu::no_sanitize("thread"), gnu::noinline]] std::uint64_t value_of(unsigned lane, std::uint64_t value,
                                                                       unsigned mask,
                                                                       const std::source_location& site) {
    return gather(value, mask, site)[lane];
  }

  [[gnu::no_sanitize("thread"), gnu::noinline]] unsigned ballot(bool predicate, unsigned mask,
                                                                const std::source_location& site) {
    const std::uint64_t* predicates = gather(predicate, mask, site);
    unsigned votes = 0;
    for (unsigned lane = 0; lane < kWarpSize; ++lane) votes |= static_cast<unsigned>(predicates[lane]) << lane;
    return votes;
  }

 private:
  static constexpr std::size_t kMostResident = 4;
  static constexpr std::uint64_t kMostIdle = 100'000, kIdlePerThread = 100;
  void begin(const Launch& launch, Entry entry, void* kernel) {
    gridDim = launch.grid;
    blockDim = launch.block;
    shared_bytes_ = launch.shared_bytes;
    random_ = Random(launch.seed);
    entry_ = entry;
    kernel_ = kernel;
    idle_ = 0;
    ready_count_ = 0;
    adopt_host(host_);
    sanitizers::release(&start_edge_);
  }

  std::vector<std::size_t> random_order(std::size_t n) {
    std::vector<std::size_t> order(n);
    for (std::size_t i = 0; i < n; ++i) order[i] = i;
    for (std::size_t i = n; i > 1; --i) std::swap(order[i - 1], order[random_.below(i)]);
    return order;
  }

  void admit(std::size_t number) {
    auto block = std::make_unique<Block>();
    const std::size_t size = count(blockDim);
    block->index = position(number, gridDim);
    block->barrier.name = "__syncthreads";
    block->barrier.expected = static_cast<unsigned>(size);
    // Not a byte more than asked for, so that AddressSanitizer sees what lies behind.
    if (posix_memalign(&block->shared, kSharedAlignment, shared_bytes_)) out_of_memory("shared memory");
    poison(block->shared, shared_bytes_);
    block->warps.resize(size / kWarpSize);
    for (Warp& warp : block->warps) {
      warp.barrier.name = "a warp collective";
      warp.barrier.expected = kWarpSize;
    }
    block->threads = std::make_unique<Thread[]>(size);
    for (std::size_t i = 0; i < size; ++i) admit_thread(*block, i);
    resident_.push_back(std::move(block));
  }

  void admit_thread(Block& block, std::size_t number) {
    Thread& thread = block.threads[number];
    thread.index = position(number, blockDim);
    thread.block = &block;
    thread.warp = &block.warps[number / kWarpSize];
    thread.lane = static_cast<unsigned>(number % kWarpSize);
    thread.fiber = fibers_.take();
    char name[96];
    std::snprintf(name, sizeof name, "block (%u, %u, %u), thread (%u, %u, %u)", block.index.x, block.index.y,
                  block.index.z, thread.index.x, thread.index.y, thread.index.z);
    prepare(*thread.fiber, run_thread, name);
    ready_[ready_count_++] = &thread;
  }

  void retire(Block& block) {
    for (std::size_t i = 0; i < count(blockDim); ++i) fibers_.give_back(block.threads[i].fiber);
    std::free(block.shared);
    for (auto& resident : resident_)
      if (resident.get() == &block) std::swap(resident, resident_.back());
    resident_.pop_back();
  }

  [[gnu::no_sanitize("thread")]] static void run_thread();

  [[noreturn, gnu::no_sanitize("thread"), gnu::noinline]] void exit_thread() {
    sanitizers::release(&end_edge_);
    Thread& self = *current_;
    idle_ = 0;
    leave(self.warp->barrier);
    leave(self.block->barrier);
    const Barrier& all = self.block->barrier;
    if (all.exited == all.expected)
      switch_fiber(*self.fiber, host_, true);
    else
      resume(*self.fiber, *pick(), true);
    std::abort();
  }

  [[gnu::no_sanitize("thread")]] void leave(Barrier& barrier) {
    ++barrier.exited;
    if (barrier.arrived) fail(barrier.site, "a thread has exited while others wait at %s", barrier.name);
  }

  [[gnu::no_sanitize("thread")]] void wait(Barrier& barrier, const std::source_location& site) {
    if (barrier.exited)
      fail(site, "%s after %u of %u threads have exited", barrier.name, barrier.exited, barrier.expected);
    if (barrier.arrived == 0) barrier.site = site;
    if (!same(barrier.site, site))
      fail(site, "divergent %s: other threads wait at %s:%u", barrier.name, barrier.site.file_name(),
           static_cast<unsigned>(barrier.site.line()));
    idle_ = 0;
    std::uint64_t* edge = &barrier.edges[barrier.phase % 2];
    sanitizers::release(edge);
    current_->next_waiting = barrier.waiting;
    barrier.waiting = current_;
    if (++barrier.arrived == barrier.expected) open(barrier);
    switch_away();
    sanitizers::acquire(edge);
  }

  [[gnu::no_sanitize("thread")]] void open(Barrier& barrier) {
    for (Thread* thread = barrier.waiting; thread; thread = thread->next_waiting) ready_[ready_count_++] = thread;
    barrier.waiting = nullptr;
    barrier.arrived = 0;
    ++barrier.phase;
  }

  [[gnu::no_sanitize("thread")]] static bool same(const std::source_location& a, const std::source_location& b) {
    return a.line() == b.line() && a.column() == b.column() && std::strcmp(a.file_name(), b.file_name()) == 0;
  }

  [[gnu::no_sanitize("thread")]] void switch_away() {
    Thread& self = *current_;
    Thread& next = *pick();
    if (&next != &self) resume(*self.fiber, next, false);
  }

  [[gnu::no_sanitize("thread")]] Thread* pick() {
    if (ready_count_ == 0) deadlock();
    Thread*& picked = ready_[random_.below(ready_count_)];
    Thread* thread = picked;
    picked = ready_[--ready_count_];
    return thread;
  }

  [[gnu::no_sanitize("thread")]] void resume(Fiber& from, Thread& thread, bool finished) {
    current_ = &thread;
    threadIdx = thread.index;
    blockIdx = thread.block->index;
    switch_fiber(from, *thread.fiber, finished);
  }

  [[noreturn, gnu::no_sanitize("thread")]] void deadlock() {
    print_error("emulator: error: deadlock: no thread can go on\n");
    report_waiting(resident_);
    stop();
  }

  [[noreturn, gnu::no_sanitize("thread")]] void livelock() {
    print_error(
        "emulator: error: livelock: %zu thread(s) spin, %llu times without any progress; %zu block(s) resident\n",
        ready_count_, static_cast<unsigned long long>(idle_), resident_.size());
    report_waiting(resident_);
    stop();
  }

  Entry entry_ = nullptr;
  void* kernel_ = nullptr;
  std::size_t shared_bytes_ = 0;
  std::uint64_t idle_ = 0;  // spins since a thread last got anywhere
  std::uint64_t start_edge_ = 0, end_edge_ = 0;
  Random random_{0};
  Fiber host_;
  FiberPool fibers_;
  std::vector<std::unique_ptr<Block>> resident_;
  Thread** ready_ = nullptr;
  std::size_t ready_count_ = 0;
  Thread* current_ = nullptr;
};

inline Scheduler scheduler;

inline void Scheduler::run_thread() {
  sanitizers::enter_stack(nullptr);
  sanitizers::acquire(&scheduler.start_edge_);
  scheduler.entry_(scheduler.kernel_);
  scheduler.exit_thread();
}

// kernel<<<...>>>(arguments...), and waits for its end.
template <typename Kernel, typename... Arguments>
void launch(const Launch& launch, Kernel kernel, Arguments... arguments) {
  auto call = [&] { kernel(arguments...); };
  scheduler.run(launch, [](void* closure) { (*static_cast<decltype(call)*>(closure))(); }, &call);
}

}  // namespace emulator
