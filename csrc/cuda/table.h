// What the kernels of a step are told, as plain data that the host builds and a GPU reads.
#pragma once

#include <cstring>
#include <functional>
#include <vector>

#include "interface/device.h"

namespace fusedstep {

// The sizes that tie kernels and tables together. A tile is what a block sweeps at a time, eight
// elements for each thread: whole 16-byte vectors of every type.
constexpr int kThreads = 256, kPerThread = 8, kTile = kThreads * kPerThread;

// The norm's blocks of kNormBlock elements, and the threads that share one: each has four of the
// sixteen sums. A tile of blocks is a subtree of the tree over all of them.
constexpr int kNormThreads = 128, kNormShare = 4, kNormTile = kNormThreads / kNormShare;

constexpr int kRowsHere = 16;  // rows that travel with the launch; more are sent

// One tensor in a sweep. No struct of a table has padding, as tables are compared as bytes.
struct Piece {
  void* param;
  const void* grad;
  void* state[kMaxStates];
  int64_t n;
  int row;
  int aligned;  // every stream begins at a multiple of 16 bytes
};

// One gradient in the norm.
struct NormPiece {
  const void* grad;
  int64_t n;
  DType dtype;
  int aligned;
};

// What the norm decides and a sweep obeys.
struct Gate {
  double norm, multiplier;  // of the gradients
  int skip, nonfinite;
  unsigned arrived;  // blocks that are done with the norm
};

// A tensor's place among those whose rows a GPU prepares.
struct Tally {
  Clock* clock;
  Live shown[kCounts];
  int group;
  int padding = 0;
};

// Pieces [0, n) and where each begins, in tiles or blocks; starts[n] is the end. Where there is one
// piece, it travels with the launch.
template <class P>
struct Pieces {
  const int64_t* starts;
  const P* all;
  P only;
  int64_t n, end;
};

struct Sweep {
  Pieces<Piece> pieces;
  const Gate* gate;  // null: no skip, no multiplier
  const Row* rows;   // null: the rows here
  Row here[kRowsHere];
};

struct Enter {
  Clock* to;
  Clock clock;
};

// After the norm, or instead of it.
struct Finish {
  Gate* gate;
  Control control;
  int rule;
  const Tally* tallies;  // null: the rows were prepared on the host
  int64_t n;
  const DeviceGroup* groups;
  Row* rows;
};

struct Norm {
  Pieces<NormPiece> pieces;
  double* sums;  // one for each tile
  Finish finish;
};

// The tensors of one step that one kernel sweeps.
struct Launch {
  unsigned uses;
  int pair;
  std::vector<Piece> pieces;
  std::vector<int64_t> starts;
};

// Everything in a step that a GPU keeps from one step to the next while it is the same.
struct Table {
  std::vector<Launch> launches;
  std::vector<NormPiece> norm_pieces;
  std::vector<int64_t> norm_starts;
  std::vector<Tally> tallies;
};

// `clock_at(slot)` is where the device keeps a tensor's clock; called with live counts only.
Table build_table(const DeviceStep& step, const std::function<Clock*(int64_t slot)>& clock_at);

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
