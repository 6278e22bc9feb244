// Large outputs are used again. The C library gives large blocks back to the system when they are freed (glibc: all
// from 32 MB on, and smaller ones at the top of its heap), and the system hands them out anew in zeroed pages of 4 KB,
// one fault at a time, which costs several times the normalization itself. A training step frees what the next one asks
// for, so such blocks wait here in between. The system may take what waits whenever it runs short (MADV_FREE), and
// blocks never add up to more than the outputs once did at the same time. Small outputs come from the C library, which
// shares what is still in the cache among all.
#include "memory.h"

#include <ATen/EmptyTensor.h>
#include <ATen/ops/empty_like.h>

#if defined(__linux__)
#include <ATen/Parallel.h>
#include <c10/core/CPUAllocator.h>
#include <pthread.h>
#include <sys/mman.h>

#include <algorithm>
#include <cstddef>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <vector>
#endif

namespace batchnorm_ext::cpu {

#if defined(__linux__) && defined(MADV_HUGEPAGE) && defined(MADV_FREE)

namespace {

constexpr size_t kHugePage = size_t{2} << 20;
constexpr size_t kLeast = size_t{16} << 20;  // smaller ones are rarely returned

struct Block {
  char* data;
  size_t bytes;  // whole huge pages
};

Block map(size_t bytes) {
  void* const mapped = mmap(nullptr, bytes + kHugePage, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (mapped == MAP_FAILED) return {nullptr, 0};
  char* const begin = static_cast<char*>(mapped);
  const size_t before = (kHugePage - reinterpret_cast<uintptr_t>(begin) % kHugePage) % kHugePage;
  if (before > 0) munmap(begin, before);
  munmap(begin + before + bytes, kHugePage - before);
  const Block block{begin + before, bytes};
  madvise(block.data, bytes, MADV_HUGEPAGE);
  // One thread a page: threads that fault on the same page at once all zero it, and all but one throw it away.
  at::parallel_for(0, static_cast<int64_t>(bytes / kHugePage), 1, [&](int64_t from, int64_t to) {
    for (int64_t i = from; i < to; ++i) *static_cast<volatile char*>(block.data + i * kHugePage) = 0;
  });
  return block;
}

void unmap(std::vector<Block>& blocks) {
  for (const Block& block : blocks) munmap(block.data, block.bytes);
  blocks.clear();
}

class OutputMemory final : public c10::Allocator {
 public:
  c10::DataPtr allocate(size_t bytes) override {
    Block block{nullptr, 0};
    if (bytes >= kLeast) block = take((bytes + kHugePage - 1) / kHugePage * kHugePage);
    if (block.data == nullptr) return c10::GetCPUAllocator()->allocate(bytes);
    c10::profiledCPUMemoryReporter().New(block.data, bytes);
    return {block.data, new Block(block), [](void* of) { self().give(static_cast<Block*>(of)); }, c10::kCPU};
  }

  void copy_data(void* to, const void* from, size_t bytes) const override { default_copy_data(to, from, bytes); }

  // Never destroyed: tensors may outlive everything.
  static OutputMemory& self() {
    static OutputMemory* const memory = new OutputMemory();
    return *memory;
  }

 private:
  // A forked child has none of the threads that could be holding the lock: it is taken before and released after.
  OutputMemory() {
    pthread_atfork([] { self().mutex_.lock(); }, [] { self().mutex_.unlock(); }, [] { self().mutex_.unlock(); });
  }

  Block take(size_t bytes) {
    std::vector<Block> dropped;
    {
      const std::lock_guard lock(mutex_);
      // The closest in size, at most a quarter larger; of several, the one given last, which caches may still hold.
      size_t best = idle_.size();
      for (size_t i = idle_.size(); i-- > 0;)
        if (idle_[i].bytes >= bytes && idle_[i].bytes <= bytes + bytes / 4 &&
            (best == idle_.size() || idle_[i].bytes < idle_[best].bytes))
          best = i;
      if (best < idle_.size()) {
        const Block block = idle_[best];
        idle_.erase(idle_.begin() + static_cast<std::ptrdiff_t>(best));
        idle_bytes_ -= block.bytes;
        used_bytes_ += block.bytes;
        return block;
      }
      used_bytes_ += bytes;
      most_used_bytes_ = std::max(most_used_bytes_, used_bytes_);
      auto oldest = idle_.begin();
      for (; oldest != idle_.end() && used_bytes_ + idle_bytes_ > most_used_bytes_; ++oldest)
        idle_bytes_ -= oldest->bytes;
      dropped.assign(idle_.begin(), oldest);
      idle_.erase(idle_.begin(), oldest);
    }
    unmap(dropped);
    const Block block = map(bytes);
    if (block.data != nullptr) return block;
    {
      const std::lock_guard lock(mutex_);
      used_bytes_ -= bytes;
      idle_bytes_ = 0;
      dropped.swap(idle_);
    }
    unmap(dropped);  // room for PyTorch's allocator, which also knows what to say if it finds none
    return block;
  }

  void give(Block* owned) {
    const Block block = *owned;
    delete owned;
    c10::profiledCPUMemoryReporter().Delete(block.data);
    if (keeps_)
      madvise(block.data, block.bytes, MADV_FREE);
    else
      munmap(block.data, block.bytes);
    const std::lock_guard lock(mutex_);
    used_bytes_ -= block.bytes;
    if (!keeps_) return;
    idle_.push_back(block);
    idle_bytes_ += block.bytes;
  }

  // BATCHNORM_EXT_KEEP_MEMORY=0 gives every block back at once.
  const bool keeps_ = [] {
    const char* const text = std::getenv("BATCHNORM_EXT_KEEP_MEMORY");
    return text == nullptr || std::strcmp(text, "0") != 0;
  }();
  std::mutex mutex_;
  std::vector<Block> idle_;  // the one given last at the end
  size_t idle_bytes_ = 0, used_bytes_ = 0, most_used_bytes_ = 0;
};

}  // namespace

at::Tensor empty_output_like(const at::Tensor& x) {
  if (x.nbytes() < kLeast) return at::empty_like(x);
  return at::Tensor(at::detail::empty_strided_generic(x.sizes(), x.strides(), &OutputMemory::self(),
                                                      c10::DispatchKeySet(c10::DispatchKey::CPU), x.scalar_type()));
}

#else

at::Tensor empty_output_like(const at::Tensor& x) { return at::empty_like(x); }

#endif

}  // namespace batchnorm_ext::cpu
