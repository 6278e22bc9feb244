// What the emulator tells AddressSanitizer and ThreadSanitizer about its fibers; nothing where neither is on.
#pragma once

#include <sys/mman.h>

#include <cstddef>

#if defined(__has_feature)
#if __has_feature(thread_sanitizer) && !defined(__SANITIZE_THREAD__)
#define __SANITIZE_THREAD__ 1
#endif
#if __has_feature(address_sanitizer) && !defined(__SANITIZE_ADDRESS__)
#define __SANITIZE_ADDRESS__ 1
#endif
#endif

#if defined(__SANITIZE_THREAD__)
#include <sanitizer/tsan_interface.h>
extern "C" {
void AnnotateIgnoreReadsBegin(const char* file, int line);
void AnnotateIgnoreReadsEnd(const char* file, int line);
void AnnotateIgnoreWritesBegin(const char* file, int line);
void AnnotateIgnoreWritesEnd(const char* file, int line);
}
#endif
#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

namespace emulator::sanitizers {

#if defined(__SANITIZE_THREAD__)
// Threads that are created anew before those of blocks that have ended serve again: whose thread a block inherits, that
// it is never found to race with. Each takes 0.8 MB and 0.3 ms.
constexpr std::size_t kFreshThreads = 3000;

inline void* this_thread() { return __tsan_get_current_fiber(); }
inline void* create_thread() { return __tsan_create_fiber(0); }
inline void name_thread(void* thread, const char* name) { __tsan_set_fiber_name(thread, name); }
inline void destroy_thread(void* thread) { __tsan_destroy_fiber(thread); }
[[gnu::no_sanitize("thread")]] inline void switch_thread(void* thread) {
  __tsan_switch_to_fiber(thread, __tsan_switch_to_fiber_no_sync);
}
[[gnu::no_sanitize("thread")]] inline void release(void* edge) { __tsan_release(edge); }
[[gnu::no_sanitize("thread")]] inline void acquire(void* edge) { __tsan_acquire(edge); }

// The host's own accesses, allocations included, while it stands between threads that are not ordered with it.
class IgnoreAccesses {
 public:
  IgnoreAccesses() {
    AnnotateIgnoreReadsBegin(__FILE__, __LINE__);
    AnnotateIgnoreWritesBegin(__FILE__, __LINE__);
  }
  ~IgnoreAccesses() {
    AnnotateIgnoreWritesEnd(__FILE__, __LINE__);
    AnnotateIgnoreReadsEnd(__FILE__, __LINE__);
  }
  IgnoreAccesses(const IgnoreAccesses&) = delete;
  IgnoreAccesses& operator=(const IgnoreAccesses&) = delete;
};

// A stack that passes from one thread to another: mapped anew, or the accesses of the two would count as races.
inline bool forget_stack(void* stack, std::size_t bytes) {
  constexpr int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED;
  return mmap(stack, bytes, PROT_READ | PROT_WRITE, flags, -1, 0) == stack;
}
#else
constexpr std::size_t kFreshThreads = 0;
inline void* this_thread() { return nullptr; }
inline void* create_thread() { return nullptr; }
inline void name_thread(void*, const char*) {}
inline void destroy_thread(void*) {}
inline void switch_thread(void*) {}
inline void release(void*) {}
inline void acquire(void*) {}
class IgnoreAccesses {
 public:
  IgnoreAccesses() {}
};
inline bool forget_stack(void*, std::size_t) { return true; }
#endif

#if defined(__SANITIZE_ADDRESS__)
inline void leave_stack(void** fake_stack, const void* next, std::size_t bytes) {
  __sanitizer_start_switch_fiber(fake_stack, next, bytes);
}
inline void enter_stack(void* fake_stack) { __sanitizer_finish_switch_fiber(fake_stack, nullptr, nullptr); }
// The frames that a finished thread never returned from are still marked.
inline void unmark_stack(void* stack, std::size_t bytes) { __asan_unpoison_memory_region(stack, bytes); }
#else
inline void leave_stack(void**, const void*, std::size_t) {}
inline void enter_stack(void*) {}
inline void unmark_stack(void*, std::size_t) {}
#endif

}  // namespace emulator::sanitizers
