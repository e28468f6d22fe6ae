// kVector neighbouring elements of the device's memory at a time, in accesses of 16 bytes, or the 8
// that four elements of 16 bits are. In PTX: from C++ the compiler splits some stores again, and does
// not know of a pointer in a table whose memory it points to.
#pragma once

#include <cuda_runtime.h>

#include "isa/isa.h"
#include "table.h"

namespace fusedstep {
namespace FUSEDSTEP_TARGET {

#ifdef __CUDACC__

FN void load_words(const uint4* from, uint4& x) {
  asm volatile("ld.global.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w)
               : "l"(__cvta_generic_to_global(from)));
}
FN void load_words(const uint2* from, uint2& x) {
  asm volatile("ld.global.v2.u32 {%0, %1}, [%2];"
               : "=r"(x.x), "=r"(x.y)
               : "l"(__cvta_generic_to_global(from)));
}
FN void store_words(uint4* to, uint4 x) {
  asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(__cvta_generic_to_global(to)),
               "r"(x.x), "r"(x.y), "r"(x.z), "r"(x.w)
               : "memory");
}
FN void store_words(uint2* to, uint2 x) {
  asm volatile("st.global.v2.u32 [%0], {%1, %2};" ::"l"(__cvta_generic_to_global(to)), "r"(x.x),
               "r"(x.y)
               : "memory");
}

#else  // on a host, where tests run the kernels

template <class Words>
FN void load_words(const Words* from, Words& x) {
  x = *from;
}
template <class Words>
FN void store_words(Words* to, Words x) {
  *to = x;
}

#endif

template <int kBytes>
struct Words {
  using type = uint4;
};
template <>
struct Words<8> {
  using type = uint2;
};

template <class T>
FN void load_vector(const T* from, T* to) {
  using W = typename Words<kVector * sizeof(T)>::type;
  constexpr int kEach = sizeof(W) / sizeof(T);
  UNROLL
  for (int i = 0; i < kVector; i += kEach) {
    W words;
    load_words(reinterpret_cast<const W*>(from + i), words);
    __builtin_memcpy(to + i, &words, sizeof(words));
  }
}
template <class T>
FN void store_vector(T* to, const T* from) {
  using W = typename Words<kVector * sizeof(T)>::type;
  constexpr int kEach = sizeof(W) / sizeof(T);
  UNROLL
  for (int i = 0; i < kVector; i += kEach) {
    W words;
    __builtin_memcpy(&words, from + i, sizeof(words));
    store_words(reinterpret_cast<W*>(to + i), words);
  }
}

}  // namespace FUSEDSTEP_TARGET
}  // namespace fusedstep
