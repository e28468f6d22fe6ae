// How a thread comes to a stream's elements: by the format, and kVector neighbours at a time.
#pragma once

#include <cuda_runtime.h>

#include <type_traits>

#include "kernels/update.h"
#include "table.h"

namespace fusedstep {
namespace FUSEDSTEP_TARGET {

// Formats, a bit for each.
using FormatSet = unsigned;
constexpr FormatSet set_of(Format format) { return 1u << static_cast<int>(format); }

constexpr FormatSet kArrays = (1u << kArrayFormats) - 2;  // as a gradient's may be

// Of arrays' formats those that are computed with in V.
template <class V>
constexpr FormatSet kOwn = kDouble<V> ? set_of(Format::kF64) : kArrays & ~set_of(Format::kF64);

// Calls body with the format, one of a set, that a stream is in.
template <FormatSet kSet, class Body>
FN void in_format(Format format, const Body& body) {
  constexpr FormatSet kOthers = kSet & (kSet - 1);
  constexpr auto kFirst = static_cast<Format>(__builtin_ctz(kSet));
  if constexpr (kOthers != 0) {
    if (format != kFirst) return in_format<kOthers>(format, body);
  }
  body(std::integral_constant<Format, kFirst>());
}

template <int kBytes>
FN void copy_words(void* to, const void* from) {  // at once, a part would lie in the stack
  UNROLL
  for (int i = 0; i < kBytes; i += 4) {
    __builtin_memcpy(static_cast<char*>(to) + i, static_cast<const char*>(from) + i, 4);
  }
}

// Accesses of 16 bytes, or the 8 or 4 that four elements of 16 or 8 bits are. In PTX: from C++ the compiler
// splits some stores again, and does not know of a pointer in a table whose memory it points to.
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
FN void load_words(const uint32_t* from, uint32_t& x) {
  asm volatile("ld.global.u32 %0, [%1];" : "=r"(x) : "l"(__cvta_generic_to_global(from)));
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
FN void store_words(uint32_t* to, uint32_t x) {
  asm volatile("st.global.u32 [%0], %1;" ::"l"(__cvta_generic_to_global(to)), "r"(x) : "memory");
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

template <class T>
using Words = std::conditional_t<
    kVector * sizeof(T) == sizeof(uint2), uint2,
    std::conditional_t<kVector * sizeof(T) == sizeof(uint32_t), uint32_t, uint4>>;

template <class T>
FN void load_vector(const T* from, T* to) {
  using W = Words<T>;
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
  using W = Words<T>;
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
