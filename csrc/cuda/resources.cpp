#include "resources.h"

#include <c10/cuda/CUDACachingAllocator.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAFunctions.h>
#include <c10/cuda/CUDAGraphsC10Utils.h>
#include <torch/library.h>

#include <array>
#include <atomic>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <set>
#include <stdexcept>
#include <string>
#include <utility>

#include "counters.h"
#include "planner.h"

namespace batchnorm_ext::cuda {
namespace {

constexpr int kMostDevices = 128;
constexpr size_t kMostPlans = 1024;  // kept by a thread

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

// f(), whose std::invalid_argument becomes Python's ValueError.
template <typename F>
auto with_value_errors(const F& f) {
  try {
    return f();
  } catch (const std::invalid_argument& error) {
    C10_THROW_ERROR(ValueError, error.what());
  }
}

Override parse(const std::string& text) {
  return with_value_errors([&] { return Override::from_text(text); });
}

// The override in force: that of the environment, read at the first use, until another one takes its place.
struct InForce {
  std::mutex mutex;
  std::string text = Override::environment();
  Override override = parse(text);
  std::atomic<int64_t> version{0};
};

InForce& in_force() {
  static auto& override = *new InForce;  // outlives the threads that may still launch at exit
  return override;
}

// Returns the text of the one before.
std::string override_plan(std::string text) {
  const Override override = parse(text);
  InForce& current = in_force();
  const std::lock_guard<std::mutex> lock(current.mutex);
  current.override = override;
  current.text.swap(text);
  ++current.version;
  return text;
}

Plan make_plan(const Request& request, int device) {
  InForce& current = in_force();
  const std::lock_guard<std::mutex> lock(current.mutex);
  return with_value_errors([&] { return Planner(request, describe(device), current.override).plan(); });
}

// Plans are made once for every shape, and again after another override. They are about cells, whatever shares a
// statistic.
const Plan& plan_for(const Request& r, int device) {
  using Key = std::array<int64_t, 13>;
  thread_local std::map<Key, Plan> plans;
  const Key key = {device,
                   in_force().version,
                   r.geometry.outer,
                   r.geometry.channels,
                   r.geometry.inner,
                   r.geometry.batch,
                   r.element_bytes,
                   r.kept_inputs,
                   r.coefficients,
                   r.aligned,
                   r.reduces,
                   r.maps,
                   cooperation_refused[device]};
  const auto found = plans.find(key);
  if (found != plans.end()) return found->second;
  if (plans.size() >= kMostPlans) plans.clear();
  return plans.emplace(key, make_plan(r, device)).first->second;
}

struct Capture {
  cudaGraph_t graph = nullptr;  // none: launches run
  unsigned long long id = 0;
};

// The capture that the stream is part of.
Capture capture_of(cudaStream_t stream) {
  cudaStreamCaptureStatus status{};
  Capture capture;
#if CUDART_VERSION >= 13000
  C10_CUDA_CHECK(cudaStreamGetCaptureInfo(stream, &status, &capture.id, &capture.graph));
#else
  C10_CUDA_CHECK(cudaStreamGetCaptureInfo_v2(stream, &status, &capture.id, &capture.graph));
#endif
  return status == cudaStreamCaptureStatusActive ? capture : Capture();
}

// Memory from CUDA itself. What torch's allocator holds without need is given back for it, but not during a capture.
void* allocate_uncached(int64_t bytes, bool capturing) {
  void* memory = nullptr;
  cudaError_t status = cudaMalloc(&memory, bytes);
  if (status == cudaErrorMemoryAllocation && !capturing) {
    static_cast<void>(cudaGetLastError());  // or the next check would report it again
    c10::cuda::CUDACachingAllocator::emptyCache();
    status = cudaMalloc(&memory, bytes);
  }
  if (status == cudaErrorMemoryAllocation) {
    static_cast<void>(cudaGetLastError());
    C10_THROW_ERROR(OutOfMemoryError, c10::str("CUDA out of memory: batchnorm_ext found no ", bytes, " bytes"));
  }
  C10_CUDA_CHECK(status);
  return memory;
}

// Not from torch's allocator: during a capture its memory belongs to a pool that other graphs may share and write to,
// so that every replay would have to zero the counters first. Zeroed here, on a stream of its own: a memset on the
// stream that is captured would be part of the graph, too.
void* allocate_counters(int64_t bytes, bool capturing) {
  const c10::cuda::CUDAStreamCaptureModeGuard allocate_while_capturing{cudaStreamCaptureModeRelaxed};
  void* const memory = allocate_uncached(bytes, capturing);
  cudaStream_t stream = nullptr;
  C10_CUDA_CHECK(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
  C10_CUDA_CHECK(cudaMemsetAsync(memory, 0, bytes, stream));
  C10_CUDA_CHECK(cudaStreamSynchronize(stream));
  C10_CUDA_CHECK(cudaStreamDestroy(stream));
  return memory;
}

// Makes the graph own the lease, and with it all that CUDA makes of the graph: clones, executables, child graphs. CUDA
// ends the lease after the last of them and its last launch ("CUDA User Objects" in the CUDA Programming Guide). What
// ends it must not call CUDA: that is why the counters are not freed then, but left to the next graph.
void hold(cudaGraph_t graph, std::unique_ptr<CounterPool::Lease> lease) {
  const auto end = [](void* held) { delete static_cast<CounterPool::Lease*>(held); };
  cudaUserObject_t object = nullptr;
  C10_CUDA_CHECK(cudaUserObjectCreate(&object, lease.get(), end, 1, cudaUserObjectNoDestructorSync));
  lease.release();
  const cudaError_t status = cudaGraphRetainUserObject(graph, object, 1, cudaGraphUserObjectMove);
  if (status != cudaSuccess) static_cast<void>(cudaUserObjectRelease(object));  // which ends the lease
  C10_CUDA_CHECK(status);
}

void* counters_for(int64_t bytes, int device, cudaStream_t stream) {
  static auto& pool = *new CounterPool;  // outlives the threads that may still launch, or end a graph, at exit
  const Capture capture = capture_of(stream);
  const Queue queue{device, stream, capture.graph ? std::optional(capture.id) : std::nullopt};
  return pool.counters(
      queue, bytes, [&](int64_t size) { return allocate_counters(size, capture.graph != nullptr); },
      [&](auto lease) { hold(capture.graph, std::move(lease)); });
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
  if (allowed.contains({kernel, device})) return;
  C10_CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                      static_cast<int>(describe(device).shared_per_block)));
  C10_CUDA_CHECK(
      cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout, cudaSharedmemCarveoutMaxShared));
  allowed.emplace(kernel, device);  // last, so that after an error the next launch tries again
}

// For tests and for tuning, which try many plans in one process.
TORCH_LIBRARY_FRAGMENT(batchnorm_ext, m) { m.def("_override_cuda_plan(str plan) -> str", override_plan); }

}  // namespace batchnorm_ext::cuda
