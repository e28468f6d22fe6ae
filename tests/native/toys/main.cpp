// Steps each rule of the registry, by a CPU's kernel and by the GPU's on the host, and prints what
// became of each stream, one line each: `rule cpu|gpu stream values...`.
#include <cstdio>
#include <vector>

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
    for (const bool gpu : {false, true}) {
      const size_t n_streams = kState + rule.states.size();
      std::vector<std::vector<float>> streams(n_streams);
      Segment segment;
      segment.n = 5;
      for (size_t s = 0; s < n_streams; ++s) {
        for (int i = 0; i < 5; ++i) streams[s].push_back(static_cast<float>(10 * s + i));
        segment.stream[s] = {streams[s].data(), Format::kF32};
      }
      Clock clock = {0, {0, 0}};
      for (int t = 1; t <= 2; ++t) {
        const Row row = rule.prepare(group, clock, 1, {});
        if (gpu) {
          SweepArguments sweep = {};
          sweep.here[0] = row;
          sweep.pieces.n = sweep.pieces.end = 1;
          sweep.pieces.only.segment = segment;
          cudaLaunchConfig_t config = {};
          config.gridDim = 1;
          config.blockDim = kThreads;
          cudaLaunchKernelEx(
              &config, sweep_kernel(static_cast<int>(r), rule.mask_of(group.hypers), false), sweep);
          cudaDeviceSynchronize();
        } else {
          scalar::kernels.sweep(static_cast<int>(r), segment, row, 0, 5);
        }
      }
      for (size_t s = 0; s < n_streams; ++s) {
        std::printf("%s %s %zu", rule.name.c_str(), gpu ? "gpu" : "cpu", s);
        for (const float x : streams[s]) std::printf(" %g", x);
        std::printf("\n");
      }
    }
  }
}
