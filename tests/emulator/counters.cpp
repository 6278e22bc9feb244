// The bookkeeping of the counters, with memory and graphs that only pretend: counters <case>. Exit code 0, or 1 and the
// line that is off.
#include "cuda/counters.h"

#include <cstdio>
#include <cstdlib>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <set>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

namespace {

using namespace batchnorm_ext::cuda;

void expect(bool holds, const char* what, int line = __builtin_LINE()) {
  if (holds) return;
  std::fprintf(stderr, "counters.cpp:%d: expected %s\n", line, what);
  std::exit(1);
}

// What it holds ends with it.
struct Graph {
  unsigned long long id;
  std::vector<std::unique_ptr<CounterPool::Lease>> leases{};
};

class Gpu {
 public:
  // The counters of a launch on a stream, captured by a graph or, without one, run.
  int* launch(int stream, Graph* graph = nullptr, int64_t bytes = 128, int device = 0) {
    const Queue queue{device, &streams_[stream], graph ? std::optional(graph->id) : std::nullopt};
    return static_cast<int*>(pool_.counters(
        queue, bytes, [&](int64_t size) { return allocate(size); },
        [&](auto lease) { graph->leases.push_back(std::move(lease)); }));
  }

  // The same where the graph cannot hold the lease.
  void fail_to_launch(int stream, const Graph& graph) {
    pool_.counters(
        {0, &streams_[stream], graph.id}, 128, [&](int64_t size) { return allocate(size); },
        [](auto) { throw std::runtime_error("no user object"); });
  }

  size_t allocations() const { return memory_.size(); }

 private:
  void* allocate(int64_t bytes) {
    const std::lock_guard<std::mutex> lock(mutex_);
    return memory_.emplace_back(bytes / sizeof(int)).data();
  }

  char streams_[8]{};
  std::mutex mutex_;
  std::vector<std::vector<int>> memory_;
  CounterPool pool_;
};

void launches_on_a_stream_share_counters() {
  Gpu gpu;
  int* const first = gpu.launch(0);
  expect(gpu.launch(0) == first, "the same counters on the same stream");
  expect(gpu.launch(1) != first, "others on another stream");
  expect(gpu.launch(0, nullptr, 128, 1) != first, "others on another device");
  expect(gpu.allocations() == 3, "one allocation for each");
}

void graphs_that_are_gone_leave_nothing() {
  Gpu gpu;
  for (unsigned long long id = 1; id <= 200; ++id) {
    Graph graph{id};
    for (int layer = 0; layer < 5; ++layer) gpu.launch(0, &graph);
    expect(graph.leases.size() == 1, "one user object for a stream of a graph");
  }
  expect(gpu.allocations() == 1, "one allocation for 200 graphs, one after the other");
}

void graphs_that_are_there_share_nothing() {
  Gpu gpu;
  std::set<int*> counters{gpu.launch(0)};
  std::vector<Graph> graphs;
  for (unsigned long long id = 1; id <= 3; ++id) counters.insert(gpu.launch(0, &graphs.emplace_back(Graph{id})));
  expect(counters.size() == 4, "different counters for three graphs and the stream they come from");
  graphs.clear();
  for (unsigned long long id = 4; id <= 6; ++id)
    expect(counters.count(gpu.launch(1, &graphs.emplace_back(Graph{id}))) == 1, "them again");
  expect(gpu.allocations() == 4, "no allocation more");
}

void branches_of_a_graph_share_nothing() {
  Gpu gpu;
  Graph graph{1};
  int* const first = gpu.launch(0, &graph);
  int* const second = gpu.launch(1, &graph);
  expect(first != second, "different counters on the branches");
  expect(gpu.launch(0, &graph) == first && gpu.launch(1, &graph) == second, "the same along a branch");
}

void what_is_outgrown_is_in_use_until_the_graph_is_gone() {
  Gpu gpu;
  {
    Graph graph{1}, other{2};
    int* const small = gpu.launch(0, &graph);
    int* const large = gpu.launch(0, &graph, kLeastCounterBytes + 1);
    expect(large != small && gpu.launch(0, &graph) == large, "larger counters, for every launch from then on");
    int* const others = gpu.launch(0, &other);
    expect(others != small && others != large, "neither for another graph");
    expect(gpu.allocations() == 3, "three allocations");
  }
  Graph third{3}, fourth{4}, fifth{5};
  int* const large = gpu.launch(0, &third, 2 * kLeastCounterBytes);
  gpu.launch(0, &fourth), gpu.launch(0, &fifth);
  expect(gpu.allocations() == 3, "twice the least for one byte more than it, and all given back");
  expect(gpu.launch(0, &third, 128) == large, "the largest where most was asked for");
}

void counters_stay_on_their_device() {
  Gpu gpu;
  {
    Graph graph{1};
    gpu.launch(0, &graph, 128, 1);
  }
  Graph graph{2};
  gpu.launch(0, &graph, 128, 0);
  expect(gpu.allocations() == 2, "an allocation on the other device");
  gpu.launch(1, &graph, 128, 1);
  expect(gpu.allocations() == 2, "none on the device that has some left");
}

void failure_leaves_the_counters_to_the_next_launch() {
  Gpu gpu;
  Graph graph{1};
  bool failed = false;
  try {
    gpu.fail_to_launch(0, graph);
  } catch (const std::runtime_error&) {
    failed = true;
  }
  expect(failed, "the exception");
  gpu.launch(0, &graph);
  expect(graph.leases.size() == 1 && gpu.allocations() == 1, "a lease of the same memory");
}

// A race on the counters, which the next graph has from another thread, would be one of the bookkeeping.
void graphs_may_end_in_any_thread() {
  Gpu gpu;
  std::vector<std::thread> threads;
  for (unsigned t = 0; t < 4; ++t)
    threads.emplace_back([&gpu, t] {
      for (unsigned i = 0; i < 100; ++i) {
        Graph graph{1 + 100 * t + i};
        ++*gpu.launch(t, &graph);
        ++*gpu.launch(t);
      }
    });
  for (std::thread& thread : threads) thread.join();
  expect(gpu.allocations() <= 8, "as many allocations as graphs and streams at once");
}

}  // namespace

int main(int count, char** arguments) {
  const std::map<std::string, void (*)()> cases{
      {"launches_on_a_stream_share_counters", launches_on_a_stream_share_counters},
      {"graphs_that_are_gone_leave_nothing", graphs_that_are_gone_leave_nothing},
      {"graphs_that_are_there_share_nothing", graphs_that_are_there_share_nothing},
      {"branches_of_a_graph_share_nothing", branches_of_a_graph_share_nothing},
      {"what_is_outgrown_is_in_use_until_the_graph_is_gone", what_is_outgrown_is_in_use_until_the_graph_is_gone},
      {"counters_stay_on_their_device", counters_stay_on_their_device},
      {"failure_leaves_the_counters_to_the_next_launch", failure_leaves_the_counters_to_the_next_launch},
      {"graphs_may_end_in_any_thread", graphs_may_end_in_any_thread}};
  for (int i = 1; i < count; ++i) cases.at(arguments[i])();
}
