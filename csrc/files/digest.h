// A digest of bytes, by which a file that changed on its way is told: XXH64.
#pragma once

#include <cstddef>
#include <cstdint>

namespace fusedstep {

// XXH64 with seed 0: 64 bits that any change of the bytes changes, but for one in 2^64. It is no
// signature: whoever wants another file with the same digest can make one.
// https://github.com/Cyan4973/xxHash/blob/dev/doc/xxhash_spec.md
//
// The bytes are copied where `copy` is given: of bytes that change meanwhile the
// digest is the copy's.
uint64_t digest(const uint8_t* bytes, size_t n, uint8_t* copy = nullptr);

}  // namespace fusedstep
