// What decides the constants of csrc/cuda/planner.h, as CSV. Launches are timed in graphs, over buffers larger than the
// L2 cache:
//   launch   microseconds of a kernel that does nothing, plain and cooperative
//   copy     bandwidth against size (MB) and blocks per multiprocessor: is kBlocksPerSm enough?
//   barrier  nanoseconds of the barrier of team.cuh against the blocks of a team: kLeastChunkBytes
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <source_location>

#include "../csrc/cuda/team.cuh"

namespace {

using namespace batchnorm_ext::cuda;

constexpr int64_t kArena = int64_t{1} << 30;  // bytes of each of two buffers
constexpr int kRounds = 200;                  // barriers of a launch

void check(cudaError_t error, std::source_location where = std::source_location::current()) {
  if (error == cudaSuccess) return;
  std::fprintf(stderr, "probes.cu:%u: %s\n", where.line(), cudaGetErrorString(error));
  std::exit(1);
}

struct Chip {
  int sms;
  uint4 *source, *target;
  cudaStream_t stream;
  cudaEvent_t begin, end;

  Chip() {
    check(cudaDeviceGetAttribute(&sms, cudaDevAttrMultiProcessorCount, 0));
    check(cudaMalloc(&source, kArena));
    check(cudaMalloc(&target, kArena));
    check(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
    check(cudaEventCreate(&begin));
    check(cudaEventCreate(&end));
    check(cudaMemsetAsync(source, 1, kArena, stream));
    check(cudaMemsetAsync(target, 0, kArena, stream));
  }

  // Microseconds of one call of launch(i): the median of seven replays of a graph of `calls` calls.
  template <typename F>
  double microseconds(int calls, const F& launch) const {
    cudaGraph_t graph;
    cudaGraphExec_t executable;
    check(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
    for (int i = 0; i < calls; ++i) launch(i);
    check(cudaStreamEndCapture(stream, &graph));
    check(cudaGraphInstantiate(&executable, graph, 0));
    float times[8];
    for (float& milliseconds : times) {
      check(cudaEventRecord(begin, stream));
      check(cudaGraphLaunch(executable, stream));
      check(cudaEventRecord(end, stream));
      check(cudaEventSynchronize(end));
      check(cudaEventElapsedTime(&milliseconds, begin, end));
    }
    std::sort(times + 1, times + 8);  // the first one warms up
    return 1e3 * times[4] / calls;
  }

  template <typename... Arguments>
  void launch(bool cooperative, int blocks, void (*kernel)(Arguments...), Arguments... values) const {
    void* arguments[] = {&values..., nullptr};
    const auto start = cooperative ? cudaLaunchCooperativeKernel<void> : cudaLaunchKernel<void>;
    check(start(reinterpret_cast<void*>(kernel), blocks, kThreads, arguments, 0, stream));
  }
};

__global__ void empty() {}

void probe_launch(const Chip& chip) {
  for (const bool cooperative : {false, true}) {
    const double us = chip.microseconds(64, [&](int) { chip.launch(cooperative, chip.sms, empty); });
    std::printf("launch,cooperative,%d,0,%.4g,us\n", cooperative, us);
  }
}

// Each thread has four loads in flight, as in the kernels.
__global__ void __launch_bounds__(kThreads, 8) copy(const uint4* source, uint4* target, int64_t count) {
  const int64_t stride = int64_t{gridDim.x} * kThreads;
  for (int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x; i < count; i += 4 * stride) {
    uint4 values[4];
#pragma unroll
    for (int u = 0; u < 4; ++u)
      if (i + u * stride < count) values[u] = load_streaming(source + i + u * stride);
#pragma unroll
    for (int u = 0; u < 4; ++u)
      if (i + u * stride < count) store_streaming(target + i + u * stride, values[u]);
  }
}

void probe_copy(const Chip& chip) {
  for (int64_t bytes = int64_t{1} << 20; bytes <= kArena; bytes *= 4)
    for (const int blocks_per_sm : {1, 2, 3, 4, 8}) {
      const int64_t places = kArena / bytes, count = bytes / int64_t{sizeof(uint4)};
      const int calls = static_cast<int>(std::clamp<int64_t>(places, 4, 64));
      const double us = chip.microseconds(calls, [&](int i) {
        const uint4* from = chip.source + i % places * count;
        chip.launch(false, chip.sms * blocks_per_sm, copy, from, chip.target + i % places * count, count);
      });
      std::printf("copy,blocks per multiprocessor,%d,%d,%.4g,GB/s\n", blocks_per_sm, int(bytes >> 20),
                  2e-3 * bytes / us);
    }
}

__global__ void __launch_bounds__(kThreads, kBlocksPerSm) barriers(unsigned* counters, int ranks) {
  const int team = blockIdx.x / ranks, rank = blockIdx.x % ranks;
  for (int i = 0; i < kRounds; ++i) meet(counters + team * (kCounterBytes / sizeof(unsigned)), rank, ranks);
}

void probe_barrier(const Chip& chip) {
  const int resident = kBlocksPerSm * chip.sms;
  auto* counters = reinterpret_cast<unsigned*>(chip.target);
  check(cudaMemsetAsync(counters, 0, resident * kCounterBytes, chip.stream));
  for (const int ranks : {1, 2, 4, 8, 16, 32, 64, chip.sms, 2 * chip.sms, resident})
    for (const int teams : {1, resident / ranks}) {
      const auto launch = [&](int) { chip.launch(true, teams * ranks, barriers, counters, ranks); };
      std::printf("barrier,teams,%d,%d,%.4g,ns\n", teams, ranks, 1e3 * chip.microseconds(4, launch) / kRounds);
    }
}

}  // namespace

int main() {
  const Chip chip;
  std::printf("probe,what,parameter,size,value,unit\n");
  for (const auto probe : {probe_launch, probe_copy, probe_barrier}) probe(chip);
  check(cudaDeviceSynchronize());
}
