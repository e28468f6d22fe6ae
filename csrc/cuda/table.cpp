// Sorts a step's tensors by the kernel that sweeps them. Knows nothing of a GPU.
#include "table.h"

#include <algorithm>
#include <cmath>
#include <cstdint>

namespace fusedstep {
namespace {

int64_t parts(int64_t n, int64_t size) { return (n + size - 1) / size; }

// Whether kVector elements of so many bytes, or 16 bytes of them, can be read at a time from the one
// on that lies `back` elements before an address.
bool aligned(const void* data, int bytes, int64_t back) {
  return (reinterpret_cast<uintptr_t>(data) - back * bytes) % std::min(bytes * kVector, 16) == 0;
}

// Whether the plain kernel takes a stream: as arrays have it, and as the step computes; a gradient may
// be in any array's format.
bool plain(const Stream& stream, int k, bool wide) {
  return k < kEma && static_cast<int>(stream.format) < kArrayFormats &&
         stream.rounding == Rounding::kNearest &&
         (k == kGrad || (stream.format == Format::kF64) == wide);
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
int launch_for(std::vector<Launch>& launches, StateMask states, bool wide, bool staged) {
  const auto same = [&](const Launch& l) {
    return l.states == states && l.wide == wide && l.staged == staged;
  };
  const auto found = std::find_if(launches.begin(), launches.end(), same);
  const auto place = static_cast<int>(found - launches.begin());
  if (found == launches.end()) launches.push_back({states, wide, staged, {0}});
  return place;
}

// The tiles of a segment in a launch; staged ones begin at the place of a multiple of kTogether.
int64_t tiles(const Segment& segment, const Launch& launch) {
  if (!launch.staged) return parts(segment.n, kTile);
  return parts(segment.first % kTogether + segment.n,
               int64_t{kStagedThreads[launch.wide]} * kVector);
}

}  // namespace

Table build_table(const DeviceStep& step, const std::function<Kept*(int64_t slot)>& kept_at) {
  Table table;
  const Options& options = step.options;
  const bool asked = options.zero_grad || options.clip_value < HUGE_VAL;
  std::vector<int> launch_of;  // by piece
  const auto add = [&](const DeviceTensor& t, int i) {
    Piece piece = {t.segment, 1, 0};
    if (options.live) piece.segment.row = i;
    const bool wide = t.segment.stream[kParam].format == Format::kF64;
    bool staged = asked || !t.counts;
    const auto present = [](const Stream& stream) { return stream.format != Format::kNone; };
    for (int k = 0; k < kStreams; ++k) {
      const Stream& stream = t.segment.stream[k];
      if (present(stream) && !plain(stream, k, wide)) staged = true;
    }
    const int64_t back = staged ? t.segment.first % kTogether : 0;
    for (const Stream& stream : t.segment.stream) {
      const FormatInfo& info = kFormatInfo[static_cast<int>(stream.format)];
      if (present(stream) && !aligned(stream.data, info.bytes, back)) piece.aligned = 0;
      if (info.block == 1 && !aligned(stream.beside, info.beside, back)) piece.aligned = 0;
    }
    launch_of.push_back(launch_for(table.launches, t.states, wide, staged));
    table.pieces.push_back(piece);
  };
  for (const bool counts : {true, false}) {
    for (size_t i = 0; i < step.n_tensors; ++i) {
      const DeviceTensor& t = step.tensors[i];
      if (t.segment.n > 0 && (t.counts != 0) == counts) add(t, static_cast<int>(i));
    }
    if (counts) table.measured = static_cast<int64_t>(table.pieces.size());
  }
  for (size_t i = 0; options.live && i < step.n_tensors; ++i) {
    const DeviceTensor& t = step.tensors[i];
    const int averages = t.segment.stream[kEma].format != Format::kNone;
    Tally tally = {kept_at(t.slot), {}, t.segment.row, t.counts, averages, t.segment.ema_begins};
    std::copy(t.shown, t.shown + kCounts, tally.shown);
    table.tallies.push_back(tally);
  }
  for (size_t i = 0; i < table.pieces.size(); ++i) {
    for (size_t l = 0; l < table.launches.size(); ++l) {
      Launch& launch = table.launches[l];
      const bool own = launch_of[i] == static_cast<int>(l);
      launch.starts.push_back(launch.starts.back() +
                              (own ? tiles(table.pieces[i].segment, launch) : 0));
    }
  }
  if (!step.options.measure) return table;

  int64_t row = 0, node = nodes_over(table.measured);
  for (int64_t i = 0; i < table.measured; ++i) {
    Piece& piece = table.pieces[i];
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
