// What the kernels of a step are told, as plain data that the host builds and a GPU reads.
#pragma once

#include <cstring>
#include <functional>
#include <type_traits>
#include <vector>

#include "interface/device.h"

namespace fusedstep {

// The sizes that tie kernels and tables together. A tile is what a block sweeps at a time: kVector
// elements for each thread, side by side where they can be moved together.
constexpr int kThreads = 256, kVector = 4, kTile = kThreads * kVector;

// Where streams are in any format; in double with twice the registers.
constexpr int kStagedThreads[] = {kThreads, kThreads / 2};  // of float, of double

// Elements that share what lies beside them, by place in the parameter: those of one warp, as staged
// tiles begin at multiples of so many places.
constexpr int kTogether = 32 * kVector;
constexpr bool blocks_fit() {
  for (const FormatInfo& info : kFormatInfo) {
    if (info.block > 1 && info.block != kTogether) return false;
  }
  return true;
}
static_assert(blocks_fit(), "a warp has the largest of a block");

// The norm's tree. A node has kFan sums; a tile is a node of rows, each of which is a block of
// kNormBlock elements, read by four threads that have kVector of its sixteen sums each.
constexpr int kFan = 32, kNormShare = kNormLanes / kVector, kNormThreads = kFan * kNormShare;

constexpr int kRowsHere = 16;  // rows that travel with the launch; more are sent

// One tensor of a step that has elements. No struct of a table has padding, as tables are compared
// as bytes.
struct Piece {
  Segment segment;  // its row with live counts: the tensor's number in the step
  int aligned;      // every stream begins where its vectors may
  int node;         // of the norm's tree, from which on there are the tensor's own
};

static_assert(std::has_unique_object_representations_v<Piece>, "no padding");

// What the norm decides and a sweep obeys.
struct Gate {
  double norm, factor;  // of the last step that measured, and what its gradients were multiplied by
  double multiplier;    // of the gradients in the sweep
  int skip;
  int missed;  // averages, of those that the host has counted, in steps that were skipped
};

// What a device keeps of a tensor that it counts alone.
struct Kept {
  Clock clock;
  int64_t begins;  // steps that were to begin its average were skipped, all of them
};

// A tensor's place among those whose rows a GPU prepares.
struct Tally {
  Kept* kept;
  Stream shown[kCounts];
  int group;
  int counts;    // whether the step is an update of it
  int averages;  // and whether it has an average,
  int begins;    // which begins
};
static_assert(std::has_unique_object_representations_v<Tally>, "no padding");

// Pieces [0, n) and where each begins, in tiles or rows; starts[n] is the end. A piece that another
// kernel sweeps has none. Where there is one piece, it travels with the launch.
struct Pieces {
  const int64_t* starts;
  const Piece* all;
  Piece only;
  int64_t n, end;
};

struct SweepArguments {
  Pieces pieces;
  const Gate* gate;   // null: no skip, no multiplier
  const Row* rows;    // null: the rows here
  const int* begins;  // by row, whether the average begins; null: the segments say
  Row here[kRowsHere];
};

struct Enter {
  Kept* to;
  Clock clock;
};

// After the norm, or instead of it.
struct Finish {
  Gate* gate;
  Options options;
  int rule;
  int padding;
  const Tally* tallies;  // null: the rows were prepared on the host
  int64_t n;
  const Group* groups;
  Row* rows;
  int* begins;  // by row
};

// A sum of squares, and whether an element of it is not finite.
struct NormSum {
  double sum;
  int bad;
  int padding;
};

struct NormArguments {
  Pieces pieces;
  NormSum* sums;      // kFan for each node; those of the pieces come first
  unsigned* arrived;  // how many of them are there, by node
  Finish finish;
};

// The tensors of one step that one kernel sweeps.
struct Launch {
  StateMask states;
  bool wide;                    // float64 parameters
  bool staged;                  // streams in any format, and what follows an update
  std::vector<int64_t> starts;  // of all pieces, in tiles
};

// Everything in a step that a GPU keeps from one step to the next while it is the same.
struct Table {
  std::vector<Piece> pieces;  // first those with a gradient
  int64_t measured = 0;       // how many those are
  std::vector<Launch> launches;
  std::vector<int64_t> norm_starts;  // in rows
  int norm_nodes = 0;
  std::vector<Tally> tallies;
};

// `kept_at(slot)` is what the device keeps of a tensor; called with live counts only.
Table build_table(const DeviceStep& step, const std::function<Kept*(int64_t slot)>& kept_at);

// A table's sections, each at a multiple of 16 bytes, as one run of memory.
class Packed {
 public:
  // The offset at which the section lies.
  template <class T>
  size_t add(const std::vector<T>& section) {
    const size_t at = (bytes_.size() + 15) / 16 * 16;
    bytes_.resize(at + section.size() * sizeof(T));
    if (!section.empty()) {
      std::memcpy(bytes_.data() + at, section.data(), section.size() * sizeof(T));
    }
    return at;
  }
  const std::vector<char>& bytes() const { return bytes_; }

 private:
  std::vector<char> bytes_;
};

}  // namespace fusedstep
