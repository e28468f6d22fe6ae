// The plain-data interface between the host code and the kernels of each instruction set.
// Only types and constants: this header is seen by every set, so it must define no function.
#pragma once

#include <cstdint>

#include "format.h"

namespace fusedstep {

constexpr int kMaxStates = 6;    // of a rule; its list of states is refused if it is longer
constexpr int kMaxVariants = 8;  // of a rule: RMSprop has 4, centered or not, with momentum or not
constexpr int kMaxScalars = 16;  // per-step constants of one rule, the two common ones included
constexpr int kMaxHypers = 16;

// A set of a rule's states, bit i for state i of its list.
using StateMask = unsigned;

// What a rule keeps for each element between steps.
enum class Sign : int { kAny, kPositive };  // kPositive: never below 0, as a mean of squares
struct State {
  const char* name;  // torch's key in a state_dict
  Sign sign;
};
struct StateList {
  State state[kMaxStates];  // those there are come first
};

// The streams of one tensor, in this order everywhere. The last two are made of the new parameter,
// as it is stored: its moving average and its copy.
constexpr int kParam = 0, kGrad = 1, kState = 2, kEma = kState + kMaxStates, kShadow = kEma + 1,
              kStreams = kShadow + 1;

// One contiguous run of elements that share a row: a tensor, or a whole flat buffer.
struct Segment {
  Stream stream[kStreams];  // a tensor without a gradient sits the update out
  int64_t n = 0;            // elements
  int64_t first = 0;        // place of the first one in its parameter, of which this may be a shard
  int row = 0;              // in the step's rows
  int ema_begins = 0;       // the average is a copy of the parameter
};

// How weight decay enters: kCoupled adds weight_decay*p to the gradient; kScaled multiplies p by
// scalars[1], which is 1 - lr*weight_decay, or 1 where there is no decay at all.
enum Decay : int { kScaled, kCoupled };

// What an update multiplies by, in double; a kernel rounds each once, to the type it computes in.
struct Row {
  double scalars[kMaxScalars];  // [0] gradient factor, [1] decay, [2...] the rule's own
  int variant;
  Decay decay;
  double clip;       // of each element of the gradient, times its factor; infinity: none
  double ema_decay;  // of the average
  uint64_t key;      // of this update's random bits
  int zero_grad;     // the gradient becomes zero
  int padding;
};

// Formats that a kernel takes as they lie in memory. Any other mix is staged: converted by blocks that
// stay in the first-level cache, to the first shape, or to the second under a float64 parameter. The
// other lines are there because staging was measured to be slower. No stream of a shape is wider than
// the type that it is computed in, which is its parameter's or float32.
struct Shape {
  Format param, grad, state;
};
constexpr Shape kShapeList[] = {
    {Format::kF32, Format::kF32, Format::kF32},
    {Format::kF64, Format::kF64, Format::kF64},
    // Staged, SGD and AdamW take so many times as long (2^26 elements, AVX2, one thread; of narrow
    // states 2^24, and SGD with momentum):
    {Format::kBf16, Format::kBf16, Format::kF32},  // 1.17, 1.04
    {Format::kF16, Format::kF16, Format::kF32},    // 1.31, 1.15
    {Format::kF32, Format::kBf16, Format::kF32},   // 1.14, 1.10
    {Format::kF32, Format::kF16, Format::kF32},    // 1.15, 1.01
    {Format::kF32, Format::kF32, Format::kBf16},   // 1.10, 1.20
    {Format::kF32, Format::kF32, Format::kQ8},     // 2.44, 2.23
};
constexpr int kShapes = sizeof(kShapeList) / sizeof(kShapeList[0]);

// Where a run of elements lies. States in 8 bits begin with a block.
struct Run {
  void* at[kStreams];
  uint8_t* exponents[kMaxStates];  // of those states' blocks
  int64_t place;                   // of the first element in its parameter
  int stochastic;                  // rounding of states
};

// Updates n elements, whole registers, of streams in a shape's formats.
using Update = void (*)(const Row& row, const Run& run, int64_t n);

struct RuleKernels {
  Update update[kMaxVariants][kShapes];  // null where a rule has fewer variants
  StateMask mask[kMaxVariants];          // the states that the variant has
};

// Elements [at, at + n) of a stream to or from floats or doubles; decode pads them with zeros to
// whole registers. `place` is the first one's in its parameter. What is rounded at random takes the bits
// of stream k in the update with this key.
struct Codec {
  void (*decode)(const Stream& stream, int64_t at, int64_t place, int64_t n, void* to);
  void (*encode)(const Stream& stream, int k, int64_t at, int64_t place, int64_t n,
                 const void* from, uint64_t key);
};

// Elements of a parameter's places [k*kBlock, (k+1)*kBlock) are staged, and encoded, together: a
// multiple of every format's block.
constexpr int64_t kBlock = 512;

// Updates elements [begin, end) of a segment in any formats.
using Sweep = void (*)(int rule, const Segment& segment, const Row& row, int64_t begin,
                       int64_t end);

// The gradients' sum of squares: blocks of kNormBlock elements, each in kNormLanes partial sums.
constexpr int kNormLanes = 16;
constexpr int kNormBlock = 512;

// Blocks [begin, end) of one gradient of n elements: writes the sum of squares of block b to
// sums[b - begin] and returns whether all elements read are finite.
using Squares = bool (*)(const void* grad, int64_t n, int64_t begin, int64_t end, double* sums);

// Everything one instruction set offers.
struct Kernels {
  const RuleKernels* rules;  // by the rule's number
  Sweep sweep;
  Codec codec[kFormats][2];           // to and from float, double
  Squares squares[kArrayFormats][2];  // of gradients as a step in float, in double, reads them
  int lanes;                          // float32 elements per register
};

}  // namespace fusedstep
