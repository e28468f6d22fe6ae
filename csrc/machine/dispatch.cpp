// CPU detection: a set is usable when the CPU has its instructions and the operating system saves
// its registers.
#include "dispatch.h"

#include <atomic>
#include <cstdlib>
#include <stdexcept>

#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace fusedstep {

namespace scalar {
extern const Kernels kernels;
}

#if defined(__x86_64__)
namespace avx2 {
extern const Kernels kernels;
}
namespace avx512 {
extern const Kernels kernels;
}
#elif defined(__aarch64__)
namespace neon {
extern const Kernels kernels;
}
#endif

namespace {

bool always() { return true; }

#if defined(__x86_64__)
// Intel SDM, volume 1, 14.3 and 15.2.
struct Features {
  unsigned leaf1_ecx = 0, leaf7_ebx = 0;
  unsigned long long saved = 0;  // XCR0: the register states that the system saves

  Features() {
    unsigned a, b, c, d;
    if (!__get_cpuid(1, &a, &b, &c, &d)) return;
    leaf1_ecx = c;
    if (c & bit_OSXSAVE) {
      unsigned low, high;
      __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
      saved = static_cast<unsigned long long>(high) << 32 | low;
    }
    if (__get_cpuid_count(7, 0, &a, &b, &c, &d)) leaf7_ebx = b;
  }
};

bool has(unsigned word, unsigned bits) { return (word & bits) == bits; }

bool has_avx2() {
  const Features f;
  return has(f.leaf1_ecx, bit_AVX | bit_FMA | bit_F16C) && has(f.leaf7_ebx, bit_AVX2) &&
         (f.saved & 0x6) == 0x6;  // xmm, ymm
}

bool has_avx512() {
  const Features f;
  return has_avx2() && has(f.leaf7_ebx, bit_AVX512F | bit_AVX512BW | bit_AVX512DQ | bit_AVX512VL) &&
         (f.saved & 0xe0) == 0xe0;  // mask registers, upper zmm, zmm16-31
}
#endif

struct Set {
  std::string name;
  const Kernels* kernels;
  bool (*usable)();
};

const std::vector<Set>& sets() {
  static const auto* const all = new std::vector<Set>{
      // never destroyed, as the rules
      {"scalar", &scalar::kernels, always},
#if defined(__x86_64__)
      {"avx2", &avx2::kernels, has_avx2},
      {"avx512", &avx512::kernels, has_avx512},
#elif defined(__aarch64__)
      {"neon", &neon::kernels, always},
#endif
  };
  return *all;
}

const Set& find(const std::string& name, const std::string& argument) {
  std::string usable;
  for (const Set& set : sets()) {
    if (!set.usable()) continue;
    if (set.name == name) return set;
    usable += (usable.empty() ? "" : ", ") + set.name;
  }
  throw std::invalid_argument(argument + " must be one of the sets usable on this machine (" +
                              usable + "), got '" + name + "'");
}

std::atomic<const Set*> chosen{nullptr};

const Set& choice() {
  const Set* set = chosen.load();
  if (!set) {
    const char* wanted = std::getenv("FUSEDSTEP_ISA");
    set = &find(wanted && *wanted ? wanted : usable_isas().back(), "FUSEDSTEP_ISA");
    chosen.store(set);
  }
  return *set;
}

}  // namespace

std::vector<std::string> compiled_isas() {
  std::vector<std::string> names;
  for (const Set& set : sets()) names.push_back(set.name);
  return names;
}

std::vector<std::string> usable_isas() {
  std::vector<std::string> names;
  for (const Set& set : sets()) {
    if (set.usable()) names.push_back(set.name);
  }
  return names;
}

const std::string& isa() { return choice().name; }
const Kernels& kernels() { return *choice().kernels; }
void set_isa(const std::string& name) { chosen.store(&find(name, "name")); }

}  // namespace fusedstep
