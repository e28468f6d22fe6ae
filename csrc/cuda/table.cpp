// Sorts a step's tensors by the kernel that sweeps them. Knows nothing of a GPU.
#include "table.h"

#include <algorithm>
#include <cstdint>

namespace fusedstep {
namespace {

int64_t parts(int64_t n, int64_t size) { return (n + size - 1) / size; }

// Whether a stream begins where kVector of its elements, or 16 bytes of them, are read at a time.
bool aligned(const Stream& stream) {
  const int bytes = kFormatInfo[static_cast<int>(stream.format)].bytes * kVector;
  return reinterpret_cast<uintptr_t>(stream.data) % std::min(bytes, 16) == 0;
}

// The nodes of a tree over n sums: those that have them, and so on up to one.
int64_t nodes_over(int64_t n) {
  int64_t nodes = 0;
  do {
    n = parts(n, kFan);
    nodes += n;
  } while (n > 1);
  return nodes;
}

// Where a tensor of so many blocks may start: small ones share a tile, each in a subtree of it.
int64_t rows_for(int64_t blocks) {
  int64_t rows = 1;
  while (rows < blocks && rows < kFan) rows *= 2;
  return rows;
}

// Pieces that one kernel sweeps, in the order of the first of each.
int launch_for(std::vector<Launch>& launches, StateMask states, bool wide) {
  size_t i = 0;
  while (i < launches.size() && (launches[i].states != states || launches[i].wide != wide)) ++i;
  if (i == launches.size()) launches.push_back({states, wide, {0}});
  return static_cast<int>(i);
}

}  // namespace

Table build_table(const DeviceStep& step, const std::function<Clock*(int64_t slot)>& clock_at) {
  Table table;
  std::vector<int> launch_of;  // by piece
  for (size_t i = 0; i < step.n_tensors; ++i) {
    const DeviceTensor& t = step.tensors[i];
    if (step.options.live) {
      Tally tally = {clock_at(t.slot), {}, t.segment.row, 0};
      std::copy(t.shown, t.shown + kCounts, tally.shown);
      table.tallies.push_back(tally);
    }
    if (t.segment.n == 0) continue;
    Piece piece = {t.segment, 1, 0};
    if (step.options.live) piece.segment.row = static_cast<int>(i);
    StateMask states = 0;
    for (int k = 0; k < kStreams; ++k) {
      const Stream& stream = t.segment.stream[k];
      if (stream.format == Format::kNone) continue;
      if (k >= kState) states |= 1u << (k - kState);
      if (!aligned(stream)) piece.aligned = 0;
    }
    const bool wide = t.segment.stream[kParam].format == Format::kF64;
    launch_of.push_back(launch_for(table.launches, states, wide));
    table.pieces.push_back(piece);
  }
  for (size_t i = 0; i < table.pieces.size(); ++i) {
    for (size_t l = 0; l < table.launches.size(); ++l) {
      std::vector<int64_t>& starts = table.launches[l].starts;
      const bool own = launch_of[i] == static_cast<int>(l);
      starts.push_back(starts.back() + (own ? parts(table.pieces[i].segment.n, kTile) : 0));
    }
  }
  if (!step.options.measure) return table;

  int64_t row = 0, node = nodes_over(static_cast<int64_t>(table.pieces.size()));
  for (Piece& piece : table.pieces) {
    const int64_t blocks = parts(piece.segment.n, kNormBlock), rows = rows_for(blocks);
    row = parts(row, rows) * rows;
    table.norm_starts.push_back(row);
    row += parts(blocks, rows) * rows;
    if (blocks <= kFan) continue;
    piece.node = static_cast<int>(node);
    node += nodes_over(parts(blocks, kFan));
  }
  table.norm_starts.push_back(row);
  table.norm_nodes = static_cast<int>(node);
  return table;
}

}  // namespace fusedstep
