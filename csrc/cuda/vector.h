// 16 bytes of the device's memory at a time, or 8. In PTX: from C++ the compiler splits some stores
// again, and does not know of a pointer in a table whose memory it points to.
#pragma once

#include <cuda_runtime.h>

#include "isa/isa.h"

namespace fusedstep {
namespace FUSEDSTEP_TARGET {

#ifdef __CUDACC__

FN uint4 load_vector(const uint4* from) {
  uint4 x;
  asm volatile("ld.global.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w)
               : "l"(__cvta_generic_to_global(from)));
  return x;
}
FN uint2 load_vector(const uint2* from) {
  uint2 x;
  asm volatile("ld.global.v2.u32 {%0, %1}, [%2];"
               : "=r"(x.x), "=r"(x.y)
               : "l"(__cvta_generic_to_global(from)));
  return x;
}
FN void store_vector(uint4* to, uint4 x) {
  asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(__cvta_generic_to_global(to)),
               "r"(x.x), "r"(x.y), "r"(x.z), "r"(x.w)
               : "memory");
}

#else  // on a host, where tests run the kernels

FN uint4 load_vector(const uint4* from) { return *from; }
FN uint2 load_vector(const uint2* from) { return *from; }
FN void store_vector(uint4* to, uint4 x) { *to = x; }

#endif

}  // namespace FUSEDSTEP_TARGET
}  // namespace fusedstep
