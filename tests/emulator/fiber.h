// Fibers: stacks that the scheduler switches between, kept from one launch to the next.
#pragma once

#include <pthread.h>
#include <sys/mman.h>
#include <ucontext.h>
#include <unistd.h>

#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <vector>

#include "sanitizers.h"

namespace emulator {

constexpr std::size_t kStackBytes = 256 << 10;  // room for the report of a sanitizer, which runs on it

struct Fiber {
  ucontext_t context;
  void* stack = nullptr;  // lowest address
  std::size_t stack_bytes = 0;
  void* fake_stack = nullptr;  // AddressSanitizer's
  void* tsan = nullptr;        // ThreadSanitizer's thread
};

[[noreturn]] inline void out_of_memory(const char* what) {
  std::perror(what);
  std::abort();
}

// Describes the stack that the caller is on.
inline void adopt_host(Fiber& host) {
  pthread_attr_t attributes;
  if (pthread_getattr_np(pthread_self(), &attributes)) out_of_memory("pthread_getattr_np");
  pthread_attr_getstack(&attributes, &host.stack, &host.stack_bytes);
  pthread_attr_destroy(&attributes);
  host.tsan = sanitizers::this_thread();
}

// A stack of its own, with a page below it that no one can touch.
inline std::unique_ptr<Fiber> new_fiber() {
  const std::size_t guard = static_cast<std::size_t>(sysconf(_SC_PAGESIZE));
  void* memory =
      mmap(nullptr, guard + kStackBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED || mprotect(memory, guard, PROT_NONE)) out_of_memory("the stack of a fiber");
  auto fiber = std::make_unique<Fiber>();
  fiber->stack = static_cast<char*>(memory) + guard;
  fiber->stack_bytes = kStackBytes;
  fiber->tsan = sanitizers::create_thread();
  getcontext(&fiber->context);
  return fiber;
}

// Makes the fiber ready to run `entry`, which must not return.
inline void prepare(Fiber& fiber, void (*entry)(), const char* name) {
  sanitizers::unmark_stack(fiber.stack, fiber.stack_bytes);
  sanitizers::name_thread(fiber.tsan, name);
  fiber.context.uc_link = nullptr;
  fiber.context.uc_stack.ss_sp = fiber.stack;
  fiber.context.uc_stack.ss_size = fiber.stack_bytes;
  makecontext(&fiber.context, entry, 0);
  // Else AddressSanitizer's swapcontext would unmark the whole stack at every switch to it.
  fiber.context.uc_stack.ss_size = 0;
  fiber.fake_stack = nullptr;
}

// Gives a fiber that has ended to a thread that is not ordered with its last one.
inline void renew(Fiber& fiber) {
  if (!sanitizers::forget_stack(fiber.stack, fiber.stack_bytes)) out_of_memory("the stack of a fiber");
  sanitizers::destroy_thread(fiber.tsan);
  fiber.tsan = sanitizers::create_thread();
}

// Goes on in `to`; returns when somebody switches back, never where the fiber is finished.
[[gnu::no_sanitize("thread"), gnu::noinline]] inline void switch_fiber(Fiber& from, Fiber& to, bool finished) {
  sanitizers::leave_stack(finished ? nullptr : &from.fake_stack, to.stack, to.stack_bytes);
  sanitizers::switch_thread(to.tsan);
  swapcontext(&from.context, &to.context);
  sanitizers::enter_stack(from.fake_stack);
}

class FiberPool {
 public:
  Fiber* take() {
    if (!idle_.empty()) return pop(idle_);
    if (all_.size() >= sanitizers::kFreshThreads && next_ended_ < ended_.size()) {
      Fiber* fiber = ended_[next_ended_++];
      renew(*fiber);
      return fiber;
    }
    all_.push_back(new_fiber());
    return all_.back().get();
  }

  void give_back(Fiber* fiber) { ended_.push_back(fiber); }

  // The next launch is ordered after this one: it can take the fibers as they are.
  void end_launch() {
    idle_.insert(idle_.end(), ended_.begin() + static_cast<std::ptrdiff_t>(next_ended_), ended_.end());
    ended_.clear();
    next_ended_ = 0;
  }

 private:
  static Fiber* pop(std::vector<Fiber*>& fibers) {
    Fiber* last = fibers.back();
    fibers.pop_back();
    return last;
  }

  std::vector<std::unique_ptr<Fiber>> all_;
  std::vector<Fiber*> idle_, ended_;  // of earlier launches, and of this one in the order of their ends
  std::size_t next_ended_ = 0;
};

}  // namespace emulator
