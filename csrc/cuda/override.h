// What the user has a say in: the text of BATCHNORM_EXT_CUDA_PLAN.
#pragma once

#include <algorithm>
#include <charconv>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <optional>
#include <stdexcept>
#include <string>
#include <string_view>
#include <system_error>

#include "shape.h"

namespace batchnorm_ext::cuda {

// kBlock   one block per group, which keeps it in shared memory between reduction and map
// kGrid    the same with a team of blocks, all resident at once, that meet at a barrier; of a group that is larger than
//          the chip they keep what they can, and read the rest again
// kSplit   two launches, reduction and map; the second reads the tensor again
// kReduce  the reduction alone
// kMap     the map alone
enum class Policy { kBlock, kGrid, kSplit, kReduce, kMap };

// "policy=grid,ranks=8,width=32,relay=1000,stagger=2000,margin=16", each at most once. What is left out follows the
// rules, and so does a policy that the tensor or the device does not allow. `ranks` are the blocks of a team and
// `width` the channels of a group, both no more than the tensor has use for; `relay` stands for kRelaySums, `stagger`
// for kStagger. `margin` is the number of multiprocessors left to others: a grid waits until all of its blocks find
// room, and may so be kept from running beside the collectives of data-parallel training.
struct Override {
  std::optional<Policy> policy{};
  std::optional<int64_t> ranks{}, width{}, relay{}, stagger{}, margin{};

  static const char* environment() {
    const char* const text = std::getenv("BATCHNORM_EXT_CUDA_PLAN");
    return text != nullptr ? text : "";
  }

  // Throws std::invalid_argument for anything but the above. An empty text overrides nothing.
  static Override from_text(std::string_view text) {
    Override result;
    for (size_t begin = 0; !text.empty() && begin <= text.size();) {
      const size_t end = std::min(text.find(',', begin), text.size());
      result.add(text.substr(begin, end - begin));
      begin = end + 1;
    }
    return result;
  }

  [[noreturn]] static void reject(const std::string& expected, std::string_view got) {
    throw std::invalid_argument("BATCHNORM_EXT_CUDA_PLAN: expected " + expected + ", got '" + std::string(got) + "'");
  }

 private:
  void add(std::string_view item) {
    const size_t equals = std::min(item.find('='), item.size());
    const std::string_view key = item.substr(0, equals), value = item.substr(std::min(equals + 1, item.size()));
    if (key == "policy") return set(policy, policy_named(value), item);
    if (key == "ranks") return set(ranks, integer(key, value, 1, kMostRanks), item);
    if (key == "width") return set(width, integer(key, value, 1, kMostElements), item);
    if (key == "relay") return set(relay, integer(key, value, 1, kMostElements), item);
    if (key == "stagger") return set(stagger, integer(key, value, 0, kMostElements), item);
    if (key == "margin") return set(margin, integer(key, value, 0, kMostElements), item);
    reject("policy, ranks, width, relay, stagger or margin as key=value", item);
  }

  template <typename T>
  static void set(std::optional<T>& field, T value, std::string_view item) {
    if (field) reject("every key at most once", item);
    field = value;
  }

  static Policy policy_named(std::string_view name) {
    if (name == "block") return Policy::kBlock;
    if (name == "grid") return Policy::kGrid;
    if (name == "split") return Policy::kSplit;
    reject("policy to be block, grid or split", name);
  }

  static int64_t integer(std::string_view key, std::string_view text, int64_t least, int64_t most) {
    int64_t value = 0;
    const char* const end = text.data() + text.size();
    const auto [stop, error] = std::from_chars(text.data(), end, value);
    if (error != std::errc() || stop != end || value < least || value > most)
      reject(std::string(key) + " to be an integer from " + std::to_string(least) + " to " + std::to_string(most),
             text);
    return value;
  }
};

}  // namespace batchnorm_ext::cuda
