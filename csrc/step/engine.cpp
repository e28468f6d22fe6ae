// Blocks of squares and pieces of segments dealt to threads, and rows found again by their clocks.
#include "engine.h"

#include <algorithm>
#include <atomic>
#include <cstring>

#include "machine/dispatch.h"
#include "machine/parallel.h"
#include "rules.h"

namespace fusedstep {
namespace {

// All segments end to end in units of work: [starts[i], starts[i + 1]) are segment i's.
template <class Units>
std::vector<int64_t> end_to_end(const std::vector<Segment>& segments, const Units& units) {
  std::vector<int64_t> starts = {0};
  starts.reserve(segments.size() + 1);
  for (const Segment& segment : segments) {
    starts.push_back(starts.back() + units(segment));
  }
  return starts;
}

// Calls body(i, from, to) for the units [from, to) of each segment i that [begin, end) has some of.
template <class Body>
void each_part(const std::vector<int64_t>& starts, int64_t begin, int64_t end, const Body& body) {
  auto i = std::upper_bound(starts.begin(), starts.end(), begin) - starts.begin() - 1;
  for (; i + 1 < static_cast<int64_t>(starts.size()) && starts[i] < end; ++i) {
    body(i, std::max<int64_t>(0, begin - starts[i]), std::min(starts[i + 1], end) - starts[i]);
  }
}

// Blocks that are summed at a time: a power of two, so that they are a subtree of their tensor's.
constexpr int64_t kChunk = 64;

// Blocks below which a measurement is over before another thread has woken up, and stays on the
// calling one.
constexpr int64_t kBlocksAlone = 256;

int64_t parts(int64_t n, int64_t size) { return (n + size - 1) / size; }

// Adds neighbours level by level; an odd one passes through, as if a zero were beside it.
double add_pairs(double* sums, int64_t n) {
  for (; n > 1; n = (n + 1) / 2) {
    for (int64_t i = 0; i < n / 2; ++i) sums[i] = sums[2 * i] + sums[2 * i + 1];
    if (n % 2) sums[n / 2] = sums[n - 1];
  }
  return n ? sums[0] : 0;
}

// Pieces of a segment start at multiples of this many of its parameter's elements, which are encoded
// together.
constexpr int64_t kPiece = kBlock;

// Elements that one thread takes at a time: a few dozen pieces for each, so that a slow core takes
// fewer, within these bounds. A step below kAlone, some 40 us long, is over on the calling thread
// before another has woken up.
constexpr int64_t kLeastGrain = 1 << 15, kMostGrain = 1 << 18, kAlone = 1 << 17;

int64_t grain_for(int64_t n) {
  if (n < kAlone) return n;
  return std::max(kLeastGrain, std::min(kMostGrain, n / num_threads() / 32 / kPiece * kPiece));
}

int64_t round_up(int64_t at, const Segment& segment) {
  if (at == 0) return 0;
  const int64_t first = segment.first % kPiece;
  return std::min(segment.n, parts(first + at, kPiece) * kPiece - first);
}

// Elements of a parameter that are copied, updated and taken apart again while they are in the
// first-level cache.
constexpr int64_t kApart = 8 * kPiece;

// Room for a block as floats or doubles, with the last register's padding.
struct alignas(64) Staged {
  char bytes[(kBlock + kNormLanes) * sizeof(double)];
};

// What a sweep adds to elements [from, to) of a parameter, which are read from `origin`, at most kApart,
// into the segment's, which may be the gradient's memory: it is read before it is written.
void sweep_apart(Sweep sweep, int rule, const Segment& segment, const Row& row,
                 const Stream& origin, int64_t from, int64_t to) {
  const Stream& param = segment.stream[kParam];
  const int64_t bytes = format_bytes(param.format);
  const bool wide = param.format == Format::kF64;
  const Codec& codec = kernels().codec[static_cast<int>(param.format)][wide];
  alignas(64) char staged[kApart * sizeof(double)];
  std::memcpy(staged, static_cast<const char*>(origin.data) + from * bytes, (to - from) * bytes);
  Segment there = segment;
  there.stream[kParam].data = reinterpret_cast<void*>(  // where element 0 would be
      reinterpret_cast<uintptr_t>(staged) - from * bytes);
  sweep(rule, there, row, from, to);
  Staged before, after;
  for (int64_t n; from < to; from += n) {
    n = std::min(to - from, kBlock);
    codec.decode(origin, from, from, n, &before);
    codec.decode(there.stream[kParam], from, from, n, &after);
    const auto subtract = [n](auto* a, const auto* b) {
      for (int64_t i = 0; i < n; ++i) a[i] -= b[i];
    };
    if (wide) {
      subtract(reinterpret_cast<double*>(&after), reinterpret_cast<const double*>(&before));
    } else {
      subtract(reinterpret_cast<float*>(&after), reinterpret_cast<const float*>(&before));
    }
    codec.encode(param, kParam, from, from, n, &after, 0);
  }
}

// Whether two clocks are the same, as bytes: NaN is NaN.
// NOLINTNEXTLINE(bugprone-suspicious-memory-comparison): it has no padding
bool same(const Clock& a, const Clock& b) { return std::memcmp(&a, &b, sizeof(a)) == 0; }

// Spread over all 64 bits of which the low ones are used.
uint64_t hash(const Counted& counted) {
  uint64_t words[sizeof(Clock) / sizeof(uint64_t)], result = static_cast<uint64_t>(counted.group);
  std::memcpy(words, &counted.clock, sizeof(words));
  for (const uint64_t word : words) {
    result = (result ^ word) * 0x9e3779b97f4a7c15u;  // 2^64 / the golden ratio, as Knuth has it
    result ^= result >> 32;
  }
  return result;
}

}  // namespace

const char* format_name(Format format) { return kFormatInfo[static_cast<int>(format)].name; }
int64_t format_bytes(Format format) { return kFormatInfo[static_cast<int>(format)].bytes; }
Format state_format(Format param) { return param == Format::kF64 ? Format::kF64 : Format::kF32; }

int64_t beside_entries(const Segment& segment, Format format) {
  const int64_t block = kFormatInfo[static_cast<int>(format)].block;
  return segment.n ? parts(segment.first % block + segment.n, block) : 0;
}

void convert(const Stream& from, const Stream& to, int64_t begin, int64_t end, int64_t first) {
  const bool wide = from.format == Format::kF64 || to.format == Format::kF64;
  const Codec& decodes = kernels().codec[static_cast<int>(from.format)][wide];
  const Codec& encodes = kernels().codec[static_cast<int>(to.format)][wide];
  Staged values;
  for (int64_t n; begin < end; begin += n) {
    n = std::min(end - begin, kBlock - (first + begin) % kBlock);
    decodes.decode(from, begin, first + begin, n, &values);
    encodes.encode(to, kParam, begin, first + begin, n, &values, 0);
  }
}

bool takes_part(const Segment& segment) { return segment.stream[kGrad].format != Format::kNone; }
bool is_written(const Segment& segment) {
  return takes_part(segment) || segment.stream[kEma].format != Format::kNone ||
         segment.stream[kShadow].format != Format::kNone;
}

Measured measure(const std::vector<Segment>& segments) {
  const auto chunks_of = [](const Segment& segment) {
    return takes_part(segment) ? parts(parts(segment.n, kNormBlock), kChunk) : 0;
  };
  const std::vector<int64_t> starts = end_to_end(segments, chunks_of);
  int64_t blocks = 0;
  for (const Segment& segment : segments) {
    if (takes_part(segment)) blocks += parts(segment.n, kNormBlock);
  }
  const int64_t chunks = starts.back();
  // Many small tensors are as many chunks with a block or two in each.
  const int64_t grain = blocks <= kBlocksAlone ? chunks : parts(chunks * kChunk, blocks);
  std::vector<Squared> sums(chunks);
  const auto& squares = kernels().squares;
  parallel_for(chunks, grain, [&](int64_t begin, int64_t end) {
    each_part(starts, begin, end, [&](int64_t i, int64_t from, int64_t to) {
      const Segment& segment = segments[i];
      const Stream& grad = segment.stream[kGrad];
      const bool wide = segment.stream[kParam].format == Format::kF64;
      const Squares own_squares = squares[static_cast<int>(grad.format)][wide];
      const int64_t last = parts(segment.n, kNormBlock);
      for (int64_t chunk = from; chunk < to; ++chunk) {
        double own[kChunk];
        const int64_t first = chunk * kChunk, end_of_chunk = std::min(last, first + kChunk);
        Squared& result = sums[starts[i] + chunk];
        result.finite = own_squares(grad.data, segment.n, first, end_of_chunk, own);
        result.sum = add_pairs(own, end_of_chunk - first);
      }
    });
  });

  Measured measured;
  measured.each.resize(segments.size());
  std::vector<double> level, tensors;
  for (size_t i = 0; i < segments.size(); ++i) {
    if (!takes_part(segments[i])) continue;
    Squared& own = measured.each[i].emplace();
    if (starts[i] == starts[i + 1]) continue;
    level.clear();
    for (int64_t chunk = starts[i]; chunk < starts[i + 1]; ++chunk) {
      level.push_back(sums[chunk].sum);
      own.finite &= sums[chunk].finite;
    }
    own.sum = add_pairs(level.data(), static_cast<int64_t>(level.size()));
    measured.all.finite &= own.finite;
    tensors.push_back(own.sum);
  }
  measured.all.sum = add_pairs(tensors.data(), static_cast<int64_t>(tensors.size()));
  return measured;
}

int Plan::row_of(int rule, const Counted& counted, const Group& group, double factor,
                 const Options& options) {
  size_t at = hash(counted);
  for (;; ++at) {
    int& row = row_at_[at &= row_at_.size() - 1];
    if (row < 0) {
      row = static_cast<int>(rows_.size());
      prepared_.push_back({counted.group, counted.clock, counted.clock});
      rows_.push_back(rules()[rule].prepare(group, prepared_.back().after, factor, options));
      return row;
    }
    if (prepared_[row].group == counted.group && same(prepared_[row].before, counted.clock)) {
      return row;
    }
  }
}

void Plan::make(int rule, const std::vector<Counted>& counted, const std::vector<Group>& groups,
                double factor, const Options& options, std::vector<Segment>& segments) {
  rows_.clear();
  prepared_.clear();
  size_t places = 1;
  while (places < 2 * segments.size()) places *= 2;
  row_at_.assign(places, -1);
  for (size_t i = 0; i < segments.size(); ++i) {
    if (!is_written(segments[i])) continue;
    Counted own = counted[i];
    // What sits the update out is averaged on: with other random bits each time.
    if (!takes_part(segments[i])) own.clock.t = options.average;
    segments[i].row = row_of(rule, own, groups[own.group], factor, options);
  }
}

void run(int rule, const std::vector<Segment>& segments, const std::vector<Row>& rows,
         const std::vector<const void*>& origins) {
  const std::vector<int64_t> starts = end_to_end(
      segments, [](const Segment& segment) { return is_written(segment) ? segment.n : 0; });
  const Sweep sweep = kernels().sweep;
  parallel_for(starts.back(), grain_for(starts.back()), [&](int64_t begin, int64_t end) {
    each_part(starts, begin, end, [&](int64_t i, int64_t from, int64_t to) {
      const Segment& segment = segments[i];
      from = round_up(from, segment);
      to = round_up(to, segment);
      if (origins.empty()) {
        if (from < to) sweep(rule, segment, rows[segment.row], from, to);
        return;
      }
      const Stream origin = {const_cast<void*>(origins[i]), segment.stream[kParam].format};
      for (int64_t end; from < to; from = end) {
        end = std::min(to, from + kApart);
        sweep_apart(sweep, rule, segment, rows[segment.row], origin, from, end);
      }
    });
  });
}

}  // namespace fusedstep
