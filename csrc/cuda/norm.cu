// The gradients' global norm, what follows from it, and the scalars of a step that only the GPU
// counts: one launch before the sweep.
#include <cuda_runtime.h>

#define FUSEDSTEP_TARGET cuda
#include "find.h"
#include "kernels/update.h"
#include "launch.h"
#include "rules/power.cpp"
#include "rules/scalars.h"
#include "vector.h"

namespace fusedstep {
namespace FUSEDSTEP_TARGET {
namespace {

constexpr int kSums = kNormLanes / kNormShare;  // of one thread
static_assert(kSums == 4, "a thread reads sixteen bytes of float32 at a time");
constexpr int kAhead = 8;  // vectors in flight
static_assert(kNormBlock % (kAhead * kNormLanes) == 0, "a whole block is read to its end");
static_assert((kNormTile & (kNormTile - 1)) == 0 && (kNormThreads & (kNormThreads - 1)) == 0,
              "subtrees of the tree");

// What is read at a time: 16 bytes, or the 8 that four numbers of 16 bits are.
template <bool kHalf>
struct VectorOf {
  using type = uint4;
};
template <>
struct VectorOf<true> {
  using type = uint2;
};

// Four neighbouring elements as doubles; those from n on are 0, which adds nothing to a square.
template <bool kWhole, class T>
FN void fetch_four(const T* from, int64_t at, int64_t n, double (&to)[kSums]) {
  using V = typename Register<T>::type;
  if constexpr (kWhole) {
    using Vector = typename VectorOf<(kSums * sizeof(T) < 16)>::type;
    alignas(16) T four[kSums];
    UNROLL
    for (unsigned i = 0; i < kSums * sizeof(T) / sizeof(Vector); ++i) {
      const Vector vector = load_vector(reinterpret_cast<const Vector*>(from + at) + i);
      __builtin_memcpy(reinterpret_cast<char*>(four) + sizeof(Vector) * i, &vector, sizeof(Vector));
    }
    UNROLL
    for (int i = 0; i < kSums; ++i) to[i] = load<V>(four + i).v;
  } else {
    UNROLL
    for (int i = 0; i < kSums; ++i) to[i] = at + i < n ? load<V>(from + at + i).v : 0;
  }
}

// This thread's share of a block's sixteen sums, as in kernels/squares.h. Returns whether an element
// is not finite.
template <bool kWhole, class T>
FN bool add_squares(const NormPiece& piece, int64_t begin, int share, double (&sums)[kSums]) {
  double bad = 0;
#pragma unroll 1
  for (int k = 0; k < kNormBlock; k += kAhead * kNormLanes) {
    double x[kAhead][kSums];
    UNROLL
    for (int i = 0; i < kAhead; ++i) {
      const int64_t at = begin + k + i * kNormLanes + share * kSums;
      fetch_four<kWhole>(static_cast<const T*>(piece.grad), at, piece.n, x[i]);
    }
    UNROLL
    for (int i = 0; i < kAhead; ++i) {
      UNROLL
      for (int l = 0; l < kSums; ++l) {
        sums[l] = __fma_rn(x[i][l], x[i][l], sums[l]);
        if (sizeof(T) == 8) bad = __fma_rn(x[i][l], 0, bad);  // its square may overflow
      }
    }
  }
  if (sizeof(T) < 8) {
    UNROLL
    for (int l = 0; l < kSums; ++l) bad = __fma_rn(sums[l], 0, bad);
  }
  return !(bad == 0);
}
template <class T>
FN bool add_squares(const NormPiece& piece, int64_t begin, int share, double (&sums)[kSums]) {
  if (piece.aligned && begin + kNormBlock <= piece.n) {
    return add_squares<true, T>(piece, begin, share, sums);
  }
  return add_squares<false, T>(piece, begin, share, sums);
}

// The sum of 2*kWidth values by adding the second half to the first, until one is left in x[0].
template <int kWidth>
FN void add_halves(double* x) {
  UNROLL
  for (int i = 0; i < kWidth; ++i) x[i] = __dadd_rn(x[i], x[i + kWidth]);
  if constexpr (kWidth > 1) add_halves<kWidth / 2>(x);
}

// The same by adding neighbours.
template <int kWidth>
FN void add_pairs(double* x) {
  UNROLL
  for (int i = 0; i < kWidth; ++i) x[i] = __dadd_rn(x[2 * i], x[2 * i + 1]);
  if constexpr (kWidth > 1) add_pairs<kWidth / 2>(x);
}

// The sum of the first 2*kWidth values of `level` by adding neighbours too, in level[0]; by one block.
template <int kWidth>
FN void add_shared(double* level) {
  const int thread = static_cast<int>(threadIdx.x);
  for (int width = kWidth; width > 0; width /= 2) {
    double sum = 0;
    if (thread < width) sum = __dadd_rn(level[2 * thread], level[2 * thread + 1]);
    __syncthreads();
    if (thread < width) level[thread] = sum;
    __syncthreads();
  }
}

// The tree over the sums of all tiles, by one block; it overwrites them. Missing sums are 0.
FN double tree(volatile double* sums, int64_t n) {
  constexpr int kLeaves = 16;  // of one thread
  __shared__ double level[kNormThreads];
  const int thread = static_cast<int>(threadIdx.x);
  do {
    constexpr int kChunk = kLeaves * kNormThreads;
    const int64_t chunks = n > 0 ? (n + kChunk - 1) / kChunk : 1;
    for (int64_t chunk = 0; chunk < chunks; ++chunk) {
      const int64_t at = (chunk * kNormThreads + thread) * kLeaves;
      double x[kLeaves];
      UNROLL
      for (int i = 0; i < kLeaves; ++i) x[i] = at + i < n ? sums[at + i] : 0;
      add_pairs<kLeaves / 2>(x);
      level[thread] = x[0];
      __syncthreads();
      add_shared<kNormThreads / 2>(level);
      if (thread == 0) sums[chunk] = level[0];  // which the chunks before this one have read
      __syncthreads();
    }
    n = chunks;
  } while (n > 1);
  return level[0];
}

FN double read(const Live& live) {
  return live.dtype == DType::f64 ? *static_cast<const double*>(live.at)
                                  : *static_cast<const float*>(live.at);
}
FN void write(const Live& live, double value) {
  if (live.dtype == DType::f64) {
    *static_cast<double*>(live.at) = value;
  } else {
    *static_cast<float*>(live.at) = static_cast<float>(value);
  }
}
// What a tensor's number shows, if it is not what is known of it.
FN bool differs(const Live& live, double known, double& shown) {
  if (!live.at) return false;
  shown = read(live);
  return shown != (live.dtype == DType::f64 ? known : static_cast<float>(known));
}

// The clock as kept, unless the numbers that show it say another.
FN Clock clock_of(const Tally& tally) {
  Clock clock = *tally.clock;
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
  if (tally.shown[0].at) write(tally.shown[0], static_cast<double>(clock.t));
  UNROLL
  for (int c = 0; c < kCounts - 1; ++c) {
    if (tally.shown[1 + c].at) write(tally.shown[1 + c], clock.carry[c]);
  }
}

template <class... Rule>
FN Row prepare_numbered(List<Rule...>, int number, const Group& group, Clock& clock) {
  Row row = {};
  int place = 0;
  ((number == place++ ? void(row = prepare<Rule>(group, clock, 1)) : void()), ...);
  return row;
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

// Counts an update of every tensor and writes its row. Each thread remembers its last two rows, in
// registers: most tensors are where another one was, but groups or counts may alternate.
__device__ __noinline__ void count_updates(const Finish& finish) {
  Prepared last = {-1, {}, {}, 0}, other = last;
  for (int64_t i = threadIdx.x; i < finish.n; i += blockDim.x) {
    const Tally& tally = finish.tallies[i];
    const Clock clock = clock_of(tally);
    if (last.group != tally.group || !same(last.before, clock)) {
      const Prepared before = last;
      last = other;
      other = before;
    }
    if (last.group == tally.group && same(last.before, clock)) {
      finish.rows[i] = finish.rows[last.at];
    } else {
      Clock after = clock;
      Group now = finish.groups[tally.group].group;
      if (finish.groups[tally.group].lr.at) now.hypers[0] = read(finish.groups[tally.group].lr);
      finish.rows[i] = prepare_numbered(Registry{}, finish.rule, now, after);
      last = {tally.group, clock, after, i};
    }
    *tally.clock = last.after;
    show(tally, last.after);
  }
}

// Decides what the sweep is to do, from the gradients' sum of squares; by one block.
FN void decide(const Finish& finish, double sum) {
  Gate& gate = *finish.gate;
  const Control& control = finish.control;
  __shared__ int skip;
  if (threadIdx.x == 0) {
    double factor = control.factor;
    if (control.scale.at) factor = factor * (1 / read(control.scale));
    const bool found_inf = control.found_inf.at && read(control.found_inf) != 0;
    const Verdict verdict = judge(sum, gate.nonfinite, found_inf, factor, control);
    gate.norm = verdict.norm;
    gate.multiplier = verdict.factor;
    gate.skip = skip = verdict.skip;
    if (control.norm.at) write(control.norm, verdict.norm);
    gate.nonfinite = 0;
    gate.arrived = 0;
  }
  __syncthreads();
  if (finish.tallies && !skip) count_updates(finish);
}

__global__ void __launch_bounds__(kNormThreads) norm(const __grid_constant__ Norm norm) {
  __shared__ double lanes[kNormTile][kNormLanes + 1];  // the odd length spreads rows over the banks
  __shared__ double level[kNormTile];
  __shared__ bool last;
  const int thread = static_cast<int>(threadIdx.x);
  const int row = thread / kNormShare, share = thread % kNormShare;
  const int64_t tiles = (norm.pieces.end + kNormTile - 1) / kNormTile;
  bool bad = false;
  int place = 0;
  for (int64_t tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
    const int64_t block = tile * kNormTile + row;
    double sums[kSums] = {};
    if (block < norm.pieces.end) {
      int64_t start;
      const NormPiece piece = find(norm.pieces, block, place, start);
      const int64_t begin = (block - start) * kNormBlock;
      if (piece.dtype == DType::f32) bad |= add_squares<float>(piece, begin, share, sums);
      if (piece.dtype == DType::f64) bad |= add_squares<double>(piece, begin, share, sums);
      if (piece.dtype == DType::bf16) bad |= add_squares<bf16>(piece, begin, share, sums);
      if (piece.dtype == DType::f16) bad |= add_squares<f16>(piece, begin, share, sums);
    }
    UNROLL
    for (int l = 0; l < kSums; ++l) lanes[row][share * kSums + l] = sums[l];
    __syncthreads();
    if (thread < kNormTile) {
      double x[kNormLanes];
      UNROLL
      for (int l = 0; l < kNormLanes; ++l) x[l] = lanes[thread][l];
      add_halves<kNormLanes / 2>(x);
      level[thread] = x[0];
    }
    __syncthreads();
    add_shared<kNormTile / 2>(level);
    if (thread == 0) norm.sums[tile] = level[0];
  }
  if (bad) atomicOr(&norm.finish.gate->nonfinite, 1);
  __threadfence();
  __syncthreads();
  if (thread == 0) last = atomicAdd(&norm.finish.gate->arrived, 1u) == gridDim.x - 1;
  __syncthreads();
  if (!last) return;
  __threadfence();
  decide(norm.finish, tree(norm.sums, tiles));
}

__global__ void __launch_bounds__(kNormThreads) finish(const __grid_constant__ Finish finish) {
  decide(finish, 0);
}

__global__ void enter(const Enter* entries, int64_t n) {
  const int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  if (i < n) *entries[i].to = entries[i].clock;
}

}  // namespace
}  // namespace FUSEDSTEP_TARGET

void (*const norm_kernel)(Norm) = FUSEDSTEP_TARGET::norm;
void (*const finish_kernel)(Finish) = FUSEDSTEP_TARGET::finish;
void (*const enter_kernel)(const Enter*, int64_t) = FUSEDSTEP_TARGET::enter;

}  // namespace fusedstep
