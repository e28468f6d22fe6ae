// Blocks of squares dealt to threads, and the tree that joins them.
#include "norm.h"

#include <algorithm>
#include <atomic>

#include "machine/dispatch.h"
#include "machine/parallel.h"

namespace fusedstep {
namespace {

// Blocks that one thread takes at a time: a power of two, so that a piece is a subtree. What is
// over before another thread has woken up stays on the calling one.
constexpr int64_t kGrain = 64, kAlone = 256;

// Adds neighbours level by level; an odd one passes through, as if a zero were beside it.
double add_pairs(double* sums, int64_t n) {
  for (; n > 1; n = (n + 1) / 2) {
    for (int64_t i = 0; i < n / 2; ++i) sums[i] = sums[2 * i] + sums[2 * i + 1];
    if (n % 2) sums[n / 2] = sums[n - 1];
  }
  return n ? sums[0] : 0;
}

}  // namespace

Squared sum_of_squares(const std::vector<Run>& runs) {
  std::vector<int64_t> starts = {0};  // [starts[i], starts[i+1]) are run i's blocks
  for (const Run& run : runs) {
    starts.push_back(starts.back() + (run.n + kNormBlock - 1) / kNormBlock);
  }
  const int64_t blocks = starts.back(), grain = blocks <= kAlone ? kAlone : kGrain;

  std::vector<double> pieces((blocks + grain - 1) / grain);
  std::atomic<bool> finite{true};
  const auto& squares = kernels().squares;
  parallel_for(blocks, grain, [&](int64_t begin, int64_t end) {
    double sums[kAlone];
    bool good = true;
    auto i = std::upper_bound(starts.begin(), starts.end(), begin) - starts.begin() - 1;
    for (int64_t at = begin; at < end; ++i) {
      const Run& run = runs[i];
      const int64_t to = std::min(end, starts[i + 1]);
      if (at == to) continue;  // an empty run
      good &= squares[static_cast<int>(run.dtype)](run.grad, run.n, at - starts[i], to - starts[i],
                                                   sums + (at - begin));
      at = to;
    }
    pieces[begin / grain] = add_pairs(sums, end - begin);
    if (!good) finite.store(false, std::memory_order_relaxed);
  });
  return {add_pairs(pieces.data(), static_cast<int64_t>(pieces.size())), finite.load()};
}

}  // namespace fusedstep
