// Steps each rule of the registry, by a CPU's kernel and by the GPU's on the host, and prints what
// became of each stream, one line each: `rule cpu|gpu stream values...`.
#include <cstdio>
#include <vector>

#define FUSEDSTEP_PAIR 0
#include "cuda/sweep.cu"
#include "step/rules.h"

using namespace fusedstep;

namespace fusedstep {
namespace scalar {
extern const Kernels kernels;
}
}  // namespace fusedstep

int main() {
  for (size_t r = 0; r < rules().size(); ++r) {
    const Rule& rule = rules()[r];
    Group group = {};
    group.hypers[0] = 0.5;
    const unsigned uses = used_states(rule, group.hypers);
    for (const bool gpu : {false, true}) {
      std::vector<float> streams[2 + kMaxStates];  // parameter, gradient, states
      for (size_t s = 0; s < 2 + rule.states.size(); ++s) {
        for (int i = 0; i < 5; ++i) streams[s].push_back(static_cast<float>(10 * s + i));
      }
      Clock clock = {0, {0, 0}};
      for (int t = 1; t <= 2; ++t) {
        const Row row = rule.prepare(group, clock, 1);
        Segment segment = {streams[0].data(), streams[1].data(), {}, 5, row.scalars, nullptr};
        for (int s = 0; s < kMaxStates; ++s) segment.state[s] = streams[2 + s].data();
        if (gpu) {
          Sweep sweep = {};
          sweep.here[0] = row;
          sweep.pieces.n = sweep.pieces.end = 1;
          Piece& piece = sweep.pieces.only = {segment.param, segment.grad, {}, 5, 0, 0};
          for (int s = 0; s < kMaxStates; ++s) piece.state[s] = segment.state[s];
          cudaLaunchConfig_t config = {};
          config.gridDim = 1;
          config.blockDim = kThreads;
          cudaLaunchKernelEx(&config, sweep_kernels<0>().find[r][uses], sweep);
          cudaDeviceSynchronize();
        } else {
          scalar::kernels.find[r][row.variant][row.decay][0](segment, 0, 5);
        }
      }
      for (size_t s = 0; s < 2 + rule.states.size(); ++s) {
        std::printf("%s %s %zu", rule.name.c_str(), gpu ? "gpu" : "cpu", s);
        for (const float x : streams[s]) std::printf(" %g", x);
        std::printf("\n");
      }
    }
  }
}
