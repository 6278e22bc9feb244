#include "resources.h"

#include <c10/cuda/CUDACachingAllocator.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAFunctions.h>
#include <c10/cuda/CUDAGraphsC10Utils.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cstring>
#include <map>
#include <mutex>
#include <set>
#include <string>
#include <tuple>
#include <utility>

namespace batchnorm_ext::cuda {
namespace {

constexpr int kMostDevices = 128;
constexpr size_t kMostPlans = 1024;               // kept by a thread
constexpr int64_t kLeastCounterBytes = 64 << 10;  // enough for every block of today's GPUs to lead a team

std::array<std::atomic<bool>, kMostDevices> cooperation_refused;

Device describe(int index) {
  const auto attribute = [&](cudaDeviceAttr name) {
    int value = 0;
    C10_CUDA_CHECK(cudaDeviceGetAttribute(&value, name, index));
    return value;
  };
  return {
      .architecture = 10 * attribute(cudaDevAttrComputeCapabilityMajor) + attribute(cudaDevAttrComputeCapabilityMinor),
      .sms = attribute(cudaDevAttrMultiProcessorCount),
      .shared_per_sm = attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor),
      .shared_per_block = attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin),
      .l2 = attribute(cudaDevAttrL2CacheSize),
      .cooperative = attribute(cudaDevAttrCooperativeLaunch) != 0 && !cooperation_refused[index]};
}

// Plans are made once for every shape, and again when the user changes the rules.
const Plan& plan_for(const Request& r, int device) {
  using Key = std::array<int64_t, 11>;
  thread_local std::map<Key, Plan> plans;
  thread_local std::string rules;
  const char* const text = Override::environment();
  if (rules != text || plans.size() >= kMostPlans) plans.clear();
  rules = text;
  const Key key = {device,
                   r.geometry.outer,
                   r.geometry.stats,
                   r.geometry.inner,
                   r.element_bytes,
                   r.inputs,
                   r.coefficients,
                   r.aligned,
                   r.reduces,
                   r.maps,
                   cooperation_refused[device]};
  const auto found = plans.find(key);
  if (found != plans.end()) return found->second;
  return plans.emplace(key, Planner(r, describe(device), Override::from_text(text)).plan()).first->second;
}

// Of the capture that the stream is part of, or 0.
unsigned long long capture_of(cudaStream_t stream) {
  cudaStreamCaptureStatus status{};
  unsigned long long id = 0;
#if CUDART_VERSION >= 13000
  C10_CUDA_CHECK(cudaStreamGetCaptureInfo(stream, &status, &id));
#else
  C10_CUDA_CHECK(cudaStreamGetCaptureInfo_v2(stream, &status, &id));
#endif
  return status == cudaStreamCaptureStatusActive ? id : 0;
}

// Counters for all launches on a stream, which come one after the other. Launches that are captured get others, since
// their graph may be replayed on any stream at any time. For the same reason they are never given back; they are not
// from torch's allocator because a stream may belong to one of its private pools today and not tomorrow.
void* counters_for(int64_t bytes, int device, cudaStream_t stream) {
  struct Counters {
    void* memory;
    int64_t bytes;
  };
  using Key = std::tuple<int, cudaStream_t, unsigned long long>;
  static std::mutex mutex;
  static auto& known = *new std::map<Key, Counters>;  // outlives the threads that may still launch at exit

  const unsigned long long capture = capture_of(stream);
  const std::lock_guard<std::mutex> lock(mutex);
  Counters& counters = known[{device, stream, capture}];
  if (counters.bytes >= bytes) return counters.memory;
  bytes = std::max({bytes, 2 * counters.bytes, kLeastCounterBytes});
  void* memory = nullptr;
  {
    const c10::cuda::CUDAStreamCaptureModeGuard allocate_while_capturing{cudaStreamCaptureModeRelaxed};
    C10_CUDA_CHECK(cudaMalloc(&memory, bytes));
  }
  C10_CUDA_CHECK(cudaMemsetAsync(memory, 0, bytes, stream));
  counters = {memory, bytes};
  return memory;
}

c10::DataPtr allocate(int64_t bytes) {
  return bytes > 0 ? c10::cuda::CUDACachingAllocator::get()->allocate(bytes) : c10::DataPtr();
}

}  // namespace

Resources acquire(const Request& request, cudaStream_t stream) {
  const int device = c10::cuda::current_device();
  TORCH_INTERNAL_ASSERT(device < kMostDevices);
  Resources resources{plan_for(request, device), nullptr, {}};
  try {
    resources.scratch = allocate(resources.plan.scratch().bytes);
  } catch (const c10::OutOfMemoryError&) {
    resources.plan = Planner(request, describe(device), {.policy = Policy::kSplit, .ranks = 1}).plan();
    resources.scratch = allocate(resources.plan.scratch().bytes);
  }
  resources.counters = counters_for(resources.plan.scratch().counter_bytes, device, stream);
  return resources;
}

void refuse_cooperation() {
  cooperation_refused[c10::cuda::current_device()] = true;
  TORCH_WARN_ONCE(
      "batchnorm_ext: a cooperative launch was refused, as it is on a GPU that is shared; normalization of large "
      "tensors takes two launches instead, and reads its input twice");
}

void allow_shared_memory(const void* kernel) {
  const int device = c10::cuda::current_device();
  thread_local std::set<std::pair<const void*, int>> allowed;
  if (!allowed.emplace(kernel, device).second) return;
  C10_CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                      static_cast<int>(describe(device).shared_per_block)));
  C10_CUDA_CHECK(
      cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout, cudaSharedmemCarveoutMaxShared));
}

}  // namespace batchnorm_ext::cuda
