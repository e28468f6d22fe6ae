// The gradients' global norm, what follows from it, and the scalars of a step that only the GPU
// counts: one launch before the sweep.
#include <cuda_runtime.h>

#define FUSEDSTEP_TARGET cuda
#include "kernels/update.h"
#include "launch.h"
#include "pieces.h"
#include "rules/power.cpp"
#include "rules/scalars.h"
#include "stream.h"

namespace fusedstep {
namespace FUSEDSTEP_TARGET {
namespace {

constexpr int kAhead = 8;  // vectors in flight
static_assert(kNormBlock % (kAhead * kNormLanes) == 0, "a whole block is read to its end");
static_assert((kFan & (kFan - 1)) == 0, "a small tensor's rows are a subtree");

// This thread's share of a block's sixteen sums, as in kernels/squares.h. Returns whether an element
// is not finite. Those from n on are 0, which adds nothing to a square.
template <bool kWhole, class F>
FN bool add_squares(const typename F::Element* from, int64_t at, int64_t n, bool narrow,
                    double (&sums)[kVector]) {
  using T = typename F::Element;
  constexpr bool kExact = !kDouble<typename F::Register>;  // squares of floats do not overflow
  double bad = 0;
#pragma unroll 1
  for (int k = 0; k < kNormBlock; k += kAhead * kNormLanes) {
    T own[kAhead][kVector];
    UNROLL
    for (int i = 0; i < kAhead; ++i, at += kNormLanes) {
      if constexpr (kWhole) {
        load_vector(from + at, own[i]);
      } else {
        UNROLL
        for (int l = 0; l < kVector; ++l) own[i][l] = at + l < n ? from[at + l] : T{};
      }
    }
    UNROLL
    for (int i = 0; i < kAhead; ++i) {
      UNROLL
      for (int l = 0; l < kVector; ++l) {
        double x = F::load(&own[i][l]).v;
        if (!kExact && narrow) x = __double2float_rn(x);
        sums[l] = __fma_rn(x, x, sums[l]);
        if (!kExact) bad = __fma_rn(x, 0, bad);
      }
    }
  }
  if (kExact) {
    UNROLL
    for (int l = 0; l < kVector; ++l) bad = __fma_rn(sums[l], 0, bad);
  }
  return !(bad == 0);
}

FN bool add_squares(const Segment& segment, int64_t block, int share, double (&sums)[kVector]) {
  const Stream& grad = segment.stream[kGrad];
  const bool narrow = segment.stream[kParam].format != Format::kF64;  // as the step reads them
  bool bad = false;
  in_format<kArrays>(grad.format, [&](auto format) {
    using F = In<decltype(format)::value>;
    using T = typename F::Element;
    const auto* from = static_cast<const T*>(grad.data);
    const int64_t at = block * kNormBlock + share * kVector;
    const bool aligned = reinterpret_cast<uintptr_t>(from) % sizeof(Words<T>) == 0;
    bad = aligned && (block + 1) * kNormBlock <= segment.n
              ? add_squares<true, F>(from, at, segment.n, narrow, sums)
              : add_squares<false, F>(from, at, segment.n, narrow, sums);
  });
  return bad;
}

// The sum of 2*kWidth values by adding the second half to the first, until one is left in x[0].
template <int kWidth>
FN void add_halves(double* x) {
  UNROLL
  for (int i = 0; i < kWidth; ++i) x[i] = __dadd_rn(x[i], x[i + kWidth]);
  if constexpr (kWidth > 1) add_halves<kWidth / 2>(x);
}

// The sums of a node, in shared memory: sum i is that of sums 2*i and 2*i + 1, down to those of its
// children, from kFan on.
struct Sums {
  double sum[2 * kFan];
  int bad[2 * kFan];

  FN void put(int child, double s, int b) {
    sum[kFan + child] = s;
    bad[kFan + child] = b;
  }
  // By one block, after all children.
  FN void add_up() {
    const int thread = static_cast<int>(threadIdx.x);
    for (int width = kFan / 2; width > 0; width /= 2) {
      __syncthreads();
      if (thread >= width) continue;
      const int i = width + thread;
      sum[i] = __dadd_rn(sum[2 * i], sum[2 * i + 1]);
      bad[i] = bad[2 * i] | bad[2 * i + 1];
    }
    __syncthreads();
  }
};

// One of n sums, whose tree begins at a node: a tensor's by its tiles, or all tensors'.
struct Child {
  int64_t node, n, at;
  int64_t piece;  // the tensor's number, or that of none
};
constexpr int64_t kAllPieces = -1;

// Puts a sum in its place. Returns whether its node has all of its children now.
FN bool arrive(const NormArguments& norm, const Child& child, double sum, int bad) {
  volatile NormSum& to = norm.sums[child.node * kFan + child.at];
  to.sum = sum;
  to.bad = bad;
  __threadfence();
  const int64_t above = child.at / kFan, children = child.n - above * kFan;
  unsigned& arrived = norm.arrived[child.node + above];
  if (atomicAdd(&arrived, 1u) != (children < kFan ? children : kFan) - 1) return false;
  arrived = 0;  // for the next step
  return true;
}

FN double read(const Stream& number) {
  return number.format == Format::kF64 ? *static_cast<const double*>(number.data)
                                       : *static_cast<const float*>(number.data);
}
FN void write(const Stream& number, double value) {
  if (number.format == Format::kF64) {
    *static_cast<double*>(number.data) = value;
  } else {
    *static_cast<float*>(number.data) = static_cast<float>(value);
  }
}
// What a tensor's number shows, if it is not what is known of it.
FN bool differs(const Stream& number, double known, double& shown) {
  if (!number.data) return false;
  shown = read(number);
  return shown != (number.format == Format::kF64 ? known : static_cast<float>(known));
}

// The clock as kept, unless the numbers that show it say another.
FN Clock clock_of(const Tally& tally) {
  Clock clock = tally.kept->clock;
  double shown;
  if (differs(tally.shown[0], static_cast<double>(clock.t), shown)) {
    clock.t = shown >= 0 && shown < 9e18 ? static_cast<int64_t>(shown) : 0;
  }
  UNROLL
  for (int c = 0; c < kCounts - 1; ++c) {
    if (differs(tally.shown[1 + c], clock.carry[c], shown)) clock.carry[c] = shown;
  }
  return clock;
}

FN void show(const Tally& tally, const Clock& clock) {
  if (tally.shown[0].data) write(tally.shown[0], static_cast<double>(clock.t));
  UNROLL
  for (int c = 0; c < kCounts - 1; ++c) {
    if (tally.shown[1 + c].data) write(tally.shown[1 + c], clock.carry[c]);
  }
}

// Each rule writes its own row: one that all of them gave would be held in registers.
template <class... Rule>
FN void prepare_numbered(List<Rule...>, int number, const Group& group, Clock& clock,
                         const Options& options, Row& row) {
  int place = 0;
  ((number == place++ ? void(row = prepare<Rule>(group, clock, 1, options)) : void()), ...);
}

FN bool same(const Clock& a, const Clock& b) {
  return a.t == b.t && a.carry[0] == b.carry[0] && a.carry[1] == b.carry[1];
}

// What a row was prepared from, the clock that follows, and where the row is.
struct Prepared {
  int group;
  Clock before, after;
  int64_t at;
};

// Counts an update of every tensor that has a gradient, and writes all rows. Each thread remembers its last two rows, in
// registers: most tensors are where another one was, but groups or counts may alternate.
__device__ __noinline__ void count_updates(const Finish& finish) {
  Prepared last = {-1, {}, {}, 0}, other = last;
  for (int64_t i = threadIdx.x; i < finish.n; i += blockDim.x) {
    const Tally& tally = finish.tallies[i];
    Clock clock = clock_of(tally);
    // As on the host: other random bits for each average of what sits the update out.
    if (!tally.counts) clock.t = finish.options.average - finish.gate->missed;
    if (last.group != tally.group || !same(last.before, clock)) {
      const Prepared before = last;
      last = other;
      other = before;
    }
    if (last.group == tally.group && same(last.before, clock)) {
      finish.rows[i] = finish.rows[last.at];
    } else {
      Clock after = clock;
      Group now = finish.groups[tally.group];
      if (now.lr.data) now.hypers[0] = read(now.lr);
      prepare_numbered(Registry{}, finish.rule, now, after, finish.options, finish.rows[i]);
      last = {tally.group, clock, after, i};
    }
    if (tally.averages) {
      finish.begins[i] = tally.begins || tally.kept->begins;
      tally.kept->begins = 0;
    }
    if (!tally.counts) continue;
    tally.kept->clock = last.after;
    show(tally, last.after);
  }
}

// Of a step that is skipped: there is no average, and what was to begin is still to.
FN void defer(const Finish& finish) {
  if (threadIdx.x == 0 && finish.options.average) ++finish.gate->missed;
  for (int64_t i = threadIdx.x; i < finish.n; i += blockDim.x) {
    const Tally& tally = finish.tallies[i];
    if (tally.averages && tally.begins) tally.kept->begins = 1;
  }
}

// Decides what the sweep is to do, from the gradients' sum of squares; by one block.
FN void decide(const Finish& finish, double sum, bool bad) {
  Gate& gate = *finish.gate;
  const Options& options = finish.options;
  __shared__ int skip;
  if (threadIdx.x == 0) {
    double factor = options.factor;
    if (options.scale.data) factor = factor * (1 / read(options.scale));
    const bool found_inf = options.found_inf.data && read(options.found_inf) != 0;
    const Verdict verdict = judge(sum, bad, found_inf, factor, options);
    if (options.measure) {
      gate.norm = verdict.norm;
      gate.factor = factor;
    }
    gate.multiplier = verdict.factor;
    gate.skip = skip = verdict.skip;
    if (options.norm.data) write(options.norm, verdict.norm);
  }
  __syncthreads();
  if (!finish.tallies) return;
  if (skip) {
    defer(finish);
  } else {
    count_updates(finish);
  }
}

// From a node that has all of its children upwards, for as long as this block is the last to arrive.
// Returns whether it has the sum of all, in node.sum[1].
FN bool climb(const NormArguments& norm, Child child, Sums& node) {
  __shared__ bool full;
  const int thread = static_cast<int>(threadIdx.x);
  do {
    __threadfence();
    if (thread < kFan) {
      const int64_t at = child.at / kFan * kFan + thread;
      const volatile NormSum& from = norm.sums[child.node * kFan + at];
      const bool there = at < child.n;
      node.put(thread, there ? from.sum : 0, there ? from.bad : 0);
    }
    node.add_up();
    const int64_t nodes = (child.n + kFan - 1) / kFan;
    if (nodes > 1) {
      child = {child.node + nodes, nodes, child.at / kFan, child.piece};
    } else if (child.piece != kAllPieces) {
      child = {0, norm.pieces.n, child.piece, kAllPieces};
    } else {
      return true;
    }
    if (thread == 0) full = arrive(norm, child, node.sum[1], node.bad[1]);
    __syncthreads();
  } while (full);
  return false;
}

__global__ void __launch_bounds__(kNormThreads) norm(const __grid_constant__ NormArguments norm) {
  __shared__ double lanes[kFan][kNormLanes + 1];  // the odd length spreads rows over the banks
  __shared__ bool bad[kNormThreads];
  __shared__ Sums node;
  __shared__ Child full[2];  // children of one or two nodes, at least, arrive from a tile
  const int thread = static_cast<int>(threadIdx.x);
  const int row = thread / kNormShare, share = thread % kNormShare;
  int place = 0;
  bool last = false;
  for (int64_t tile = blockIdx.x; tile * kFan < norm.pieces.end; tile += gridDim.x) {
    int64_t start, block = 0, blocks = 0;  // of the row's tensor, which may end before
    Piece piece;
    double sums[kVector] = {};
    bad[thread] = false;
    if (const int64_t at = tile * kFan + row; at < norm.pieces.end) {
      piece = find(norm.pieces, at, place, start);
      block = at - start;
      blocks = (piece.segment.n + kNormBlock - 1) / kNormBlock;
      if (block < blocks) bad[thread] = add_squares(piece.segment, block, share, sums);
    }
    UNROLL
    for (int l = 0; l < kVector; ++l) lanes[row][share * kVector + l] = sums[l];
    __syncthreads();
    if (thread < kFan) {
      double x[kNormLanes];
      UNROLL
      for (int l = 0; l < kNormLanes; ++l) x[l] = lanes[thread][l];
      add_halves<kNormLanes / 2>(x);
      int any = 0;
      UNROLL
      for (int i = 0; i < kNormShare; ++i) any |= bad[thread * kNormShare + i];
      node.put(thread, x[0], any);
      if (thread < 2) full[thread].n = 0;
    }
    node.add_up();
    // The first of a tensor's rows here has its sum: of a tile, or of the whole tensor.
    if (share == 0 && block < blocks && block % kFan == 0) {
      int64_t rows = 1;
      while (rows < blocks && rows < kFan) rows *= 2;
      const int i = static_cast<int>((kFan + row) / rows);
      const Child child = blocks > kFan
                              ? Child{piece.node, (blocks + kFan - 1) / kFan, block / kFan, place}
                              : Child{0, norm.pieces.n, place, kAllPieces};
      if (arrive(norm, child, node.sum[i], node.bad[i])) full[child.at / kFan % 2] = child;
    }
    __syncthreads();
    for (const Child& child : full) {
      if (child.n) last |= climb(norm, child, node);
    }
  }
  if (last) decide(norm.finish, node.sum[1], node.bad[1] != 0);
}

__global__ void __launch_bounds__(kNormThreads) finish(const __grid_constant__ Finish finish) {
  decide(finish, 0, false);
}

__global__ void enter(const Enter* entries, int64_t n) {
  const int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  if (i < n) *entries[i].to = {entries[i].clock, 0};
}

}  // namespace
}  // namespace FUSEDSTEP_TARGET

void (*const norm_kernel)(NormArguments) = FUSEDSTEP_TARGET::norm;
void (*const finish_kernel)(Finish) = FUSEDSTEP_TARGET::finish;
void (*const enter_kernel)(const Enter*, int64_t) = FUSEDSTEP_TARGET::enter;

}  // namespace fusedstep
