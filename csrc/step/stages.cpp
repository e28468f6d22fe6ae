// The engine as a table of functions: plain arrays become its vectors, exceptions become words.
#include "stages.h"

#include <cstdio>
#include <exception>
#include <new>
#include <vector>

#include "engine.h"
#include "machine/float_mode.h"
#include "rules.h"

namespace fusedstep {
namespace {

// What `body` throws, as words that last until the thread's next call.
template <class Body>
const char* words_of(const Body& body) {
  // A string would have to be destroyed with its thread, which glibc 2.17 has no public function for.
  thread_local char words[256];
  const FloatMode mode;
  try {
    body();
    return nullptr;
  } catch (const std::bad_alloc&) {
    return "a step found no memory";
  } catch (const std::exception& error) {
    std::snprintf(words, sizeof(words), "%s", error.what());
    return words;
  }
}

int rule(const char* name, int* hypers) {
  for (size_t i = 0; i < rules().size(); ++i) {
    if (rules()[i].name != name) continue;
    *hypers = static_cast<int>(rules()[i].hypers.size());
    return static_cast<int>(i);
  }
  return -1;
}

const char* measure(const Segment* segments, size_t n, Sum* sum) {
  return words_of([&] {
    const Squared all = fusedstep::measure({segments, segments + n}).all;
    *sum = {all.sum, all.finite, 0};
  });
}

const char* prepare(int rule, const Group* groups, size_t n, const Sum* sum, const Options* options,
                    Clock* clock, Row* rows, Verdict* verdict) {
  return words_of([&] {
    *verdict = {0, options->factor, false};
    if (options->measure) *verdict = judge(sum->squares, !sum->finite, false, *options);
    if (verdict->skip) return;
    const Clock before = *clock;
    for (size_t i = 0; i < n; ++i) {
      *clock = before;
      rows[i] = rules()[rule].prepare(groups[i], *clock, verdict->factor, *options);
    }
  });
}

const char* sweep(int rule, const Segment* segments, size_t n, const Row* rows, size_t n_rows,
                  const void* const* origins) {
  return words_of([&] {
    std::vector<const void*> from;
    if (origins) from.assign(origins, origins + n);
    run(rule, {segments, segments + n}, {rows, rows + n_rows}, from);
  });
}

}  // namespace

const Stages& stages() {
  static const Stages all = {sizeof(Stages), rule, measure, prepare, sweep};
  return all;
}

}  // namespace fusedstep
