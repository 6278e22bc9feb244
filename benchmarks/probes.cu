// What a GPU can do, as far as csrc/cuda/plan.h decides by it. Prints one JSON object per line.
//
//   nvcc -O3 -std=c++20 -arch=sm_90 benchmarks/probes.cu -o build/probes && build/probes
//
//   launch    microseconds for a kernel that does nothing, plain and cooperative
//   copy      bandwidth against size and blocks per multiprocessor: is kBlocksPerSm enough?
//   segments  bandwidth where blocks take slices of rows, against the bytes of a slice in a row and the slices under
//             way at once: kSegmentBytes
//   barrier   nanoseconds of the barrier of team.cuh against the blocks of a team: kLeastChunkBytes
//   cluster   the same for the barrier of a thread block cluster, and for a sum over its shared memory: is a policy for
//             clusters worth its code?
//
// Launches are timed in graphs, over buffers larger than the L2 cache.
#include <cooperative_groups.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "../csrc/cuda/team.cuh"

namespace {

using namespace batchnorm_ext::cuda;
namespace cg = cooperative_groups;

constexpr int64_t kArena = int64_t{1} << 30;  // bytes of each of two buffers
constexpr int kRounds = 200;                  // barriers of a launch

void check(cudaError_t error, int line) {
  if (error == cudaSuccess) return;
  std::fprintf(stderr, "probes.cu:%d: %s\n", line, cudaGetErrorString(error));
  std::exit(1);
}

struct Chip {
  cudaDeviceProp properties;
  uint4 *source, *target;
  cudaStream_t stream;

  Chip() {
    check(cudaGetDeviceProperties(&properties, 0), __LINE__);
    check(cudaMalloc(&source, kArena), __LINE__);
    check(cudaMalloc(&target, kArena), __LINE__);
    check(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), __LINE__);
    check(cudaMemsetAsync(source, 1, kArena, stream), __LINE__);
    check(cudaMemsetAsync(target, 2, kArena, stream), __LINE__);
  }
  int sms() const { return properties.multiProcessorCount; }

  // Microseconds of one call of launch(i), the median of seven replays of a graph of so many.
  template <typename F>
  double microseconds(int calls, const F& launch) const {
    cudaGraph_t graph;
    cudaGraphExec_t executable;
    check(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal), __LINE__);
    for (int i = 0; i < calls; ++i) launch(i);
    check(cudaStreamEndCapture(stream, &graph), __LINE__);
    check(cudaGraphInstantiate(&executable, graph, 0), __LINE__);
    cudaEvent_t begin, end;
    check(cudaEventCreate(&begin), __LINE__);
    check(cudaEventCreate(&end), __LINE__);
    std::vector<float> times;
    for (int turn = 0; turn < 8; ++turn) {
      check(cudaEventRecord(begin, stream), __LINE__);
      check(cudaGraphLaunch(executable, stream), __LINE__);
      check(cudaEventRecord(end, stream), __LINE__);
      check(cudaEventSynchronize(end), __LINE__);
      float milliseconds;
      check(cudaEventElapsedTime(&milliseconds, begin, end), __LINE__);
      if (turn > 0) times.push_back(milliseconds);  // the first one warms up
    }
    check(cudaEventDestroy(begin), __LINE__);
    check(cudaEventDestroy(end), __LINE__);
    check(cudaGraphExecDestroy(executable), __LINE__);
    check(cudaGraphDestroy(graph), __LINE__);
    std::sort(times.begin(), times.end());
    return 1e3 * times[times.size() / 2] / calls;
  }
};

__global__ void empty() {}

void probe_launch(const Chip& chip) {
  for (const bool cooperative : {false, true}) {
    const double us = chip.microseconds(64, [&](int) {
      if (cooperative)
        check(
            cudaLaunchCooperativeKernel(reinterpret_cast<void*>(empty), chip.sms(), kThreads, nullptr, 0, chip.stream),
            __LINE__);
      else
        empty<<<chip.sms(), kThreads, 0, chip.stream>>>();
      check(cudaGetLastError(), __LINE__);
    });
    std::printf("{\"probe\": \"launch\", \"cooperative\": %s, \"us\": %.3f}\n", cooperative ? "true" : "false", us);
  }
}

// Four loads under way in each thread, as in the kernels, of those packs that are inside.
__device__ __forceinline__ void copy_packs(const uint4* source, uint4* target, int64_t stride, const auto& inside) {
  uint4 values[4];
#pragma unroll
  for (int u = 0; u < 4; ++u)
    if (inside(u)) values[u] = load_streaming(source + u * stride);
#pragma unroll
  for (int u = 0; u < 4; ++u)
    if (inside(u)) store_streaming(target + u * stride, values[u]);
}

__global__ void __launch_bounds__(kThreads, 8) copy(const uint4* source, uint4* target, int64_t count) {
  const int64_t stride = int64_t{gridDim.x} * kThreads;
  for (int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x; i < count; i += 4 * stride)
    copy_packs(source + i, target + i, stride, [&](int u) { return i + u * stride < count; });
}

void probe_copy(const Chip& chip) {
  for (int64_t bytes = int64_t{1} << 20; bytes <= kArena; bytes *= 4) {
    const int places = static_cast<int>(kArena / bytes), calls = std::clamp(places, 4, 64);
    const int64_t count = bytes / sizeof(uint4);
    const auto report = [&](const char* how, int blocks_per_sm, double us) {
      std::printf(
          "{\"probe\": \"copy\", \"how\": \"%s\", \"mb\": %lld, \"blocks_per_sm\": %d, \"us\": %.3f, \"gbps\": %.1f}\n",
          how, static_cast<long long>(bytes >> 20), blocks_per_sm, us, 2e-3 * bytes / us);
    };
    for (const int blocks_per_sm : {1, 2, 3, 4, 8})
      report("kernel", blocks_per_sm, chip.microseconds(calls, [&](int i) {
        const int64_t at = i % places * count;
        copy<<<chip.sms() * blocks_per_sm, kThreads, 0, chip.stream>>>(chip.source + at, chip.target + at, count);
        check(cudaGetLastError(), __LINE__);
      }));
    report("memcpy", 0, chip.microseconds(calls, [&](int i) {
      const int64_t at = i % places * count;
      check(cudaMemcpyAsync(chip.target + at, chip.source + at, bytes, cudaMemcpyDeviceToDevice, chip.stream),
            __LINE__);
    }));
  }
}

// Rows of 4 KiB, in slices of `width` packs. `teams` slices are under way at once, each shared by the blocks of a team.
constexpr int kRowPacks = 256;

__global__ void __launch_bounds__(kThreads, kBlocksPerSm)
    copy_slices(const uint4* source, uint4* target, int rows, int width, int teams) {
  const int team = blockIdx.x % teams, rank = blockIdx.x / teams, ranks = gridDim.x / teams;
  if (rank >= ranks) return;
  const int chunk = (rows + ranks - 1) / ranks, rows_at_once = kThreads / width;
  const int first = rank * chunk, last = min(first + chunk, rows);
  const int row_of_thread = threadIdx.x / width, column = threadIdx.x % width;
  for (int slice = team; slice < kRowPacks / width; slice += teams) {
    for (int row = first + row_of_thread; row < last; row += 4 * rows_at_once) {
      const int64_t at = int64_t{row} * kRowPacks + slice * width + column, stride = int64_t{rows_at_once} * kRowPacks;
      copy_packs(source + at, target + at, stride, [&](int u) { return row + u * rows_at_once < last; });
    }
  }
}

void probe_segments(const Chip& chip) {
  const int64_t bytes = kArena / 4;
  const int rows = static_cast<int>(bytes / (kRowPacks * sizeof(uint4)));
  for (const int width : {2, 4, 8, 16, 32})
    for (const int teams : {1, 4, 16, kRowPacks / width}) {
      if (teams > kRowPacks / width || (teams == 16 && kRowPacks / width == 16)) continue;
      const double us = chip.microseconds(4, [&](int i) {
        const int64_t at = i % 4 * (bytes / sizeof(uint4));
        copy_slices<<<chip.sms() * kBlocksPerSm, kThreads, 0, chip.stream>>>(chip.source + at, chip.target + at, rows,
                                                                             width, teams);
        check(cudaGetLastError(), __LINE__);
      });
      std::printf("{\"probe\": \"segments\", \"bytes\": %d, \"slices_at_once\": %d, \"us\": %.3f, \"gbps\": %.1f}\n",
                  width * 16, teams, us, 2e-3 * bytes / us);
    }
}

__global__ void __launch_bounds__(kThreads, kBlocksPerSm) barriers(unsigned* counters, int ranks) {
  const int team = blockIdx.x / ranks, rank = blockIdx.x % ranks;
  for (int i = 0; i < kRounds; ++i) meet(counters + team * (kCounterBytes / sizeof(unsigned)), rank, ranks);
}

void probe_barrier(const Chip& chip) {
  const int resident = kBlocksPerSm * chip.sms();
  auto* counters = reinterpret_cast<unsigned*>(chip.target);
  check(cudaMemsetAsync(counters, 0, resident * kCounterBytes, chip.stream), __LINE__);
  for (int ranks : {1, 2, 4, 8, 16, 32, 64, chip.sms(), 2 * chip.sms(), resident})
    for (const bool alone : {true, false}) {
      const int teams = alone ? 1 : resident / ranks;
      if (!alone && teams == 1) continue;
      void* arguments[] = {&counters, &ranks};
      const double us = chip.microseconds(4, [&](int) {
        check(cudaLaunchCooperativeKernel(reinterpret_cast<void*>(barriers), teams * ranks, kThreads, arguments, 0,
                                          chip.stream),
              __LINE__);
      });
      std::printf("{\"probe\": \"barrier\", \"ranks\": %d, \"teams\": %d, \"ns\": %.1f}\n", ranks, teams,
                  1e3 * us / kRounds);
    }
}

// Every block tells a number to the others through its shared memory, and adds up all of them.
__global__ void __launch_bounds__(kThreads, kBlocksPerSm) cluster_sums(double2* result, bool exchange) {
#if __CUDA_ARCH__ >= 900
  __shared__ double2 mine[2];
  cg::cluster_group cluster = cg::this_cluster();
  double2 sum{0, 0};
  for (int i = 0; i < kRounds; ++i) {
    if (threadIdx.x == 0) mine[i % 2] = {sum.x + i, sum.y};
    cluster.sync();
    if (exchange && threadIdx.x == 0)
      for (unsigned rank = 0; rank < cluster.num_blocks(); ++rank) {
        const double2 other = *cluster.map_shared_rank(&mine[i % 2], rank);
        sum.x += other.x, sum.y += other.y;
      }
  }
  cluster.sync();  // nobody leaves while its memory is read
  if (threadIdx.x == 0) result[blockIdx.x] = sum;
#endif
}

void probe_cluster(const Chip& chip) {
  if (chip.properties.major < 9) return;
  auto* result = reinterpret_cast<double2*>(chip.target);
  check(cudaFuncSetAttribute(cluster_sums, cudaFuncAttributeNonPortableClusterSizeAllowed, 1), __LINE__);
  for (const unsigned ranks : {2u, 4u, 8u, 16u})
    for (const bool exchange : {false, true}) {
      cudaLaunchAttribute attribute{};
      attribute.id = cudaLaunchAttributeClusterDimension;
      attribute.val.clusterDim = {ranks, 1, 1};
      cudaLaunchConfig_t how{};
      how.gridDim = chip.sms() / ranks * ranks;
      how.blockDim = kThreads;
      how.stream = chip.stream;
      how.attrs = &attribute;
      how.numAttrs = 1;
      int clusters = 0;
      if (cudaOccupancyMaxActiveClusters(&clusters, cluster_sums, &how) != cudaSuccess || clusters == 0) {
        cudaGetLastError();
        continue;
      }
      const double us =
          chip.microseconds(4, [&](int) { check(cudaLaunchKernelEx(&how, cluster_sums, result, exchange), __LINE__); });
      std::printf("{\"probe\": \"cluster\", \"ranks\": %u, \"exchange\": %s, \"clusters\": %d, \"ns\": %.1f}\n", ranks,
                  exchange ? "true" : "false", clusters, 1e3 * us / kRounds);
    }
}

}  // namespace

int main() {
  const Chip chip;
  std::printf("{\"probe\": \"chip\", \"name\": \"%s\", \"sms\": %d, \"l2_mb\": %d}\n", chip.properties.name, chip.sms(),
              chip.properties.l2CacheSize >> 20);
  for (const auto probe : {probe_launch, probe_copy, probe_segments, probe_barrier, probe_cluster}) {
    probe(chip);
    std::fflush(stdout);
  }
  check(cudaDeviceSynchronize(), __LINE__);
}
