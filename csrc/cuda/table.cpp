// Sorts a step's tensors by the kernel that sweeps them. Knows nothing of a GPU.
#include "table.h"

#include <cstdint>

namespace fusedstep {
namespace {

bool aligned(const void* at) { return reinterpret_cast<uintptr_t>(at) % 16 == 0; }

int64_t parts(int64_t n, int64_t size) { return (n + size - 1) / size; }

Launch& launch_for(std::vector<Launch>& launches, const DeviceTensor& tensor) {
  for (Launch& launch : launches) {
    if (launch.uses == tensor.uses && launch.pair == tensor.pair) return launch;
  }
  launches.push_back({tensor.uses, tensor.pair, {}, {0}});
  return launches.back();
}

}  // namespace

Table build_table(const DeviceStep& step, const std::function<Clock*(int64_t slot)>& clock_at) {
  Table table;
  table.norm_starts.push_back(0);
  for (size_t i = 0; i < step.n_tensors; ++i) {
    const DeviceTensor& t = step.tensors[i];
    if (step.control.live) {
      Tally tally = {clock_at(t.slot), {}, t.row};
      for (int s = 0; s < kCounts; ++s) tally.shown[s] = t.shown[s];
      table.tallies.push_back(tally);
    }
    if (t.n == 0) continue;
    Piece piece = {t.param,
                   t.grad,
                   {},
                   t.n,
                   step.control.live ? static_cast<int>(i) : t.row,
                   aligned(t.param) && aligned(t.grad) ? 1 : 0};
    for (int s = 0; s < kMaxStates; ++s) {
      if (!(t.uses >> s & 1)) continue;
      piece.state[s] = t.state[s];
      if (!aligned(t.state[s])) piece.aligned = 0;
    }
    Launch& launch = launch_for(table.launches, t);
    launch.pieces.push_back(piece);
    launch.starts.push_back(launch.starts.back() + parts(t.n, kTile));
    if (!step.control.measure) continue;
    table.norm_pieces.push_back({t.grad, t.n, kTypePairs[t.pair].grad, aligned(t.grad) ? 1 : 0});
    table.norm_starts.push_back(table.norm_starts.back() + parts(t.n, kNormBlock));
  }
  return table;
}

}  // namespace fusedstep
