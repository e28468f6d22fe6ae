// The plain-data interface between the host code and the kernels of each instruction set.
// Only types and constants: this header is seen by every set, so it must define no function.
#pragma once

#include <cstdint>

namespace fusedstep {

struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

enum class DType : int { f32, f64, bf16, f16 };
constexpr int kDTypes = 4;

constexpr int kMaxStates = 3;    // AMSGrad and RMSprop (centered, momentum) have the most
constexpr int kMaxVariants = 4;  // RMSprop: centered or not, momentum or not
constexpr int kMaxScalars = 16;  // per-step constants of one rule, the two common ones included
constexpr int kMaxHypers = 16;

// How weight decay enters: kCoupled adds weight_decay*p to the gradient; kScaled multiplies p by
// scalars[1], which is 1 - lr*weight_decay, or 1 where there is no decay at all.
enum Decay : int { kScaled, kCoupled, kDecays };

struct Segment;

// Updates elements [begin, end) of a segment.
using Kernel = void (*)(const Segment& segment, int64_t begin, int64_t end);

// The gradients' sum of squares: blocks of kNormBlock elements, each in kNormLanes partial sums.
constexpr int kNormLanes = 16;
constexpr int kNormBlock = 512;

// Blocks [begin, end) of one gradient of n elements: writes the sum of squares of block b to
// sums[b - begin] and returns whether all elements read are finite.
using Squares = bool (*)(const void* grad, int64_t n, int64_t begin, int64_t end, double* sums);

// One contiguous run of elements that share their scalars: a tensor, or a whole flat buffer.
struct Segment {
  void* param;
  const void* grad;
  void* state[kMaxStates];  // null where the variant has no such state
  int64_t n;                // elements
  const double* scalars;    // [0] gradient factor, [1] decay, [2...] the rule's own
  Kernel kernel;
};

// Parameter and gradient types that are compiled in, in the order of Kernels::find's last index.
struct TypePair {
  DType param, grad;
};
constexpr TypePair kTypePairs[] = {
    {DType::f32, DType::f32}, {DType::f64, DType::f64},  {DType::bf16, DType::bf16},
    {DType::f16, DType::f16}, {DType::f32, DType::bf16}, {DType::f32, DType::f16},
};
constexpr int kPairs = sizeof(kTypePairs) / sizeof(kTypePairs[0]);

constexpr int kRules = 12;  // the length of rules/registry.h, checked there

// Everything one instruction set offers.
struct Kernels {
  Kernel find[kRules][kMaxVariants][kDecays][kPairs];  // null where a rule has fewer variants
  Squares squares[kDTypes];                            // by the gradient's DType
  int lanes;                                           // float32 elements per register
};

}  // namespace fusedstep
