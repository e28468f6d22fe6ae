// What XLA calls: one function for each stage of a step, over all leaves of a tree and all members of a
// batch. They keep nothing: counts, states and rows come in and go out as arrays.
//
// A batch is what vmap makes: all operands get leading dimensions, those of the first one, which is a
// number or a vector else. Numbers of 64 bits, which JAX has not unless told, go as pairs of words.
#include "handlers.h"

#include <algorithm>
#include <cstring>
#include <limits>
#include <string>
#include <string_view>
#include <vector>

#include "frame.h"

namespace py = pybind11;

namespace fusedstep::jax {
namespace {

const Stages* stages = nullptr;
PyObject* evaluate = nullptr;  // never let go of: XLA may call as the process ends

const FormatInfo& info_of(Format format) { return kFormatInfo[static_cast<int>(format)]; }

void check(const char* error) {
  if (error) throw Wrong(error);
}

// That an array has n elements of so many bytes; what it is.
Array of(const Array& array, int64_t n, int64_t bytes) {
  if (array.n() != n || array.bytes() != bytes) throw Wrong("an array has another size");
  return array;
}

// Arrays whose elements are words of structs: n structs T.
template <class T>
Array structs(const Array& array, int64_t n) {
  static_assert(sizeof(T) % sizeof(uint32_t) == 0);
  return of(array, n * static_cast<int64_t>(sizeof(T) / sizeof(uint32_t)), sizeof(uint32_t));
}

int rule_of(const Frame& frame, int& hypers) {
  const std::string name(frame.text("rule"));
  const int rule = stages->rule(name.c_str(), &hypers);
  if (rule < 0) throw Wrong("there is no rule " + name);
  return rule;
}

// Formats of streams, of which Python gives kStreams numbers for each leaf.
Format format_at(const Span<int32_t>& formats, size_t leaf, int k) {
  const int32_t format = formats[leaf * kStreams + k];
  if (format < 0 || format >= kFormats) throw Wrong("there is no such format");
  return static_cast<Format>(format);
}

Span<int32_t> formats_of(const Frame& frame, size_t leaves) {
  const auto formats = frame.span<int32_t>("formats");
  if (formats.size != leaves * kStreams) throw Wrong("formats have another size");
  return formats;
}

// -- measure: the gradients' sum of squares -------------------------------------------------------

// count, gradients -> sums
void measure(const Frame& frame) {
  const int64_t members = frame.argument(0).n();
  const auto sizes = frame.span<int64_t>("sizes");
  const size_t leaves = sizes.size;
  const auto formats = formats_of(frame, leaves);
  std::vector<Segment> segments(leaves * members);
  for (size_t i = 0; i < leaves; ++i) {
    const Format format = format_at(formats, i, kGrad);
    const int bytes = info_of(format).bytes;
    const Array grads = of(frame.argument(1 + i), sizes[i] * members, bytes);
    for (int64_t b = 0; b < members; ++b) {
      Segment& segment = segments[b * leaves + i];
      segment.n = sizes[i];
      segment.stream[kParam].format = format_at(formats, i, kParam);
      segment.stream[kGrad] = {grads.data() + b * sizes[i] * bytes, format};
    }
  }
  const Array sums = structs<Sum>(frame.result(0), members);
  for (int64_t b = 0; b < members; ++b) {
    Sum own;
    check(stages->measure(segments.data() + b * leaves, leaves, &own));
    sums.set(b, own);
  }
}

// -- prepare: the rows of the next update ---------------------------------------------------------

// The values of schedules at step t, into `to`.
void look_up(std::string_view text, int64_t t, double* to, size_t n) {
  const py::gil_scoped_acquire lock;
  try {
    const py::sequence values =
        py::reinterpret_borrow<py::object>(evaluate)(py::str(text.data(), text.size()), t);
    if (values.size() != n) throw Wrong("there are more or fewer schedules");
    for (size_t i = 0; i < n; ++i) to[i] = values[i].cast<double>();
  } catch (py::error_already_set& error) {
    throw std::invalid_argument(py::str(error.value()));  // while the lock is held
  }
}

// Clock::carry.
struct Carry {
  double values[sizeof(Clock::carry) / sizeof(double)];
};

// What the sweep must know beside rows.
struct Flags {
  int32_t skip, begins;
};

// What Python calls `Numbers`, but for the groups.
Options options_of(const double* numbers, const Span<int64_t>& switches) {
  Options options;
  options.factor = numbers[0];
  options.max_norm = numbers[1];
  options.clip_value = numbers[2];
  options.ema_decay = numbers[3];
  options.seed = static_cast<uint64_t>(switches[0]);
  options.measure = static_cast<int>(switches[1]);
  options.skip_nonfinite = static_cast<int>(switches[2]);
  return options;
}
constexpr size_t kNumbers = 4, kSwitches = 3;

// count, carry, traced numbers, sums -> count, carry, rows, flags, norms
void prepare(const Frame& frame) {
  int hypers;
  const int rule = rule_of(frame, hypers);
  const auto groups = frame.span<double>("groups"), numbers = frame.span<double>("numbers");
  const auto traced_at = frame.span<int32_t>("traced_at");
  const auto scheduled_at = frame.span<int32_t>("scheduled_at");
  const auto switches = frame.span<int64_t>("switches");
  const size_t width = 3 + hypers;  // maximize, decoupled, weight_decay, then the rule's
  const size_t n_groups = groups.size / width;
  if (groups.size != n_groups * width || numbers.size != kNumbers || switches.size != kSwitches) {
    throw Wrong("groups have another size");
  }
  for (const auto& places : {traced_at, scheduled_at}) {
    for (const int32_t place : places) {
      if (place < 0 || place >= static_cast<int64_t>(groups.size + kNumbers)) {
        throw Wrong("there is no such hyperparameter");
      }
    }
  }
  const Array count = frame.argument(0), next = frame.result(0);
  const int64_t members = count.n();
  const Array carry = structs<Carry>(frame.argument(1), members);
  const Array traced = frame.argument(2);
  of(traced, members * static_cast<int64_t>(traced_at.size), traced.bytes());
  const Array sums = structs<Sum>(frame.argument(3), members);
  of(next, members, count.bytes());
  const Array carried = structs<Carry>(frame.result(1), members);
  const Array rows = structs<Row>(frame.result(2), members * static_cast<int64_t>(n_groups));
  const Array flags = structs<Flags>(frame.result(3), members);
  const Array norms = frame.result(4);
  of(norms, members, norms.bytes());

  std::vector<double> values, now(scheduled_at.size);
  std::vector<Group> all(n_groups);
  std::vector<Row> own(n_groups);
  for (int64_t b = 0; b < members; ++b) {
    Clock clock = {count.integer(b), {}};
    std::memcpy(clock.carry, carry.data() + b * sizeof(Carry), sizeof(Carry));
    values.assign(groups.begin(), groups.end());
    values.insert(values.end(), numbers.begin(), numbers.end());
    for (size_t i = 0; i < traced_at.size; ++i) {
      values[traced_at[i]] = traced.number(b * traced_at.size + i);
    }
    if (!now.empty()) look_up(frame.text("schedules"), clock.t, now.data(), now.size());
    for (size_t i = 0; i < now.size(); ++i) values[scheduled_at[i]] = now[i];
    for (size_t g = 0; g < n_groups; ++g) {
      const double* from = values.data() + g * width;
      all[g] = {from[0] != 0, static_cast<int>(from[1]), from[2], {}, {}};
      std::copy(from + 3, from + width, all[g].hypers);
    }
    const bool begins = clock.t == 0;
    const auto sum = sums.get<Sum>(b);
    const Options options = options_of(values.data() + groups.size, switches);
    if (!(options.factor > 0 && options.factor <= std::numeric_limits<double>::max())) {
      throw std::invalid_argument("loss_scale must be finite and > 0, got " +
                                  std::to_string(1 / options.factor));
    }
    Verdict verdict;
    check(
        stages->prepare(rule, all.data(), n_groups, &sum, &options, &clock, own.data(), &verdict));
    std::memcpy(carried.data() + b * sizeof(Carry), clock.carry, sizeof(Carry));
    if (next.wide()) {
      next.set(b, clock.t);
    } else {  // the count stays where it cannot rise, as optax has it
      constexpr int64_t kMost = std::numeric_limits<int32_t>::max();
      next.set(b, static_cast<int32_t>(std::min(clock.t, kMost)));
    }
    flags.set(b, Flags{verdict.skip != 0, begins});
    norms.put(b, verdict.norm);
    std::memcpy(rows.data() + b * n_groups * sizeof(Row), own.data(), n_groups * sizeof(Row));
  }
}

// -- sweep: the update of all leaves --------------------------------------------------------------

// Arguments and results one after the other.
struct Next {
  const Frame& frame;
  int64_t argument, result = 0;

  char* read(int64_t n, int bytes) { return of(frame.argument(argument++), n, bytes).data(); }
  char* written(int64_t n, int bytes) { return of(frame.result(result++), n, bytes).data(); }
};

// flags, rows, streams -> those of them that are written
void sweep(const Frame& frame) {
  int hypers;
  const int rule = rule_of(frame, hypers);
  const auto sizes = frame.span<int64_t>("sizes");
  const auto group_of = frame.span<int32_t>("group_of");
  const auto stochastic = frame.span<int32_t>("stochastic");
  const bool apart = frame.text("form") == "apart";
  const size_t leaves = sizes.size;
  const auto formats = formats_of(frame, leaves);
  const auto members =
      static_cast<int64_t>(frame.argument(0).n() * sizeof(uint32_t) / sizeof(Flags));
  const Array flags = structs<Flags>(frame.argument(0), members);
  const int64_t n_groups = frame.argument(1).n() /
                           static_cast<int64_t>(sizeof(Row) / sizeof(uint32_t)) /
                           std::max<int64_t>(members, 1);
  const Array rows = structs<Row>(frame.argument(1), members * n_groups);
  if (group_of.size != leaves || stochastic.size != kStreams)
    throw Wrong("leaves differ in number");
  std::vector<Row> own(members * n_groups);
  if (!own.empty()) std::memcpy(own.data(), rows.data(), own.size() * sizeof(Row));

  // What is written lies in the results, in the memory of the argument that it was: XLA has copied
  // what somebody else may still read. What is to be added to a parameter lies where its gradient did,
  // or elsewhere.
  std::vector<Segment> segments(leaves * members);
  std::vector<const void*> origins(apart ? segments.size() : 0);
  Next next = {frame, 2};
  for (size_t i = 0; i < leaves; ++i) {
    const int64_t n = sizes[i];
    if (group_of[i] < 0 || group_of[i] >= n_groups) throw Wrong("a leaf has no group");
    for (int k = 0; k < kStreams; ++k) {
      const Format format = format_at(formats, i, k);
      if (format == Format::kNone) continue;
      const FormatInfo& info = info_of(format);
      const int64_t entries = info.block ? (n + info.block - 1) / info.block : 0;
      char* data = next.read(n * members, info.bytes);
      char* beside = info.block ? next.read(entries * members, info.beside) : nullptr;
      const char* const origin = data;
      if (k != kGrad) {
        const bool moves = apart && k == kParam;
        char* const to = next.written(n * members, info.bytes);
        char* const to_beside = info.block ? next.written(entries * members, info.beside) : nullptr;
        if (n && ((!moves && to != data) || to_beside != beside)) {
          throw Wrong("XLA gave a result other memory than its argument has");
        }
        data = to;
      }
      for (int64_t b = 0; b < members; ++b) {
        segments[b * leaves + i].stream[k] = {
            data + b * n * info.bytes, format,
            stochastic[k] ? Rounding::kStochastic : Rounding::kNearest,
            info.block ? beside + b * entries * info.beside : nullptr};
        if (apart && k == kParam) origins[b * leaves + i] = origin + b * n * info.bytes;
      }
    }
    for (int64_t b = 0; b < members; ++b) {
      Segment& segment = segments[b * leaves + i];
      segment.n = n;
      segment.row = static_cast<int>(b * n_groups) + group_of[i];
      segment.ema_begins = flags.get<Flags>(b).begins;
    }
  }
  if (next.argument != frame.arguments() || next.result != frame.results()) {
    throw Wrong("leaves differ in number");
  }

  // Members that skip keep what they had, and differ by nothing.
  size_t kept = 0;
  for (int64_t b = 0; b < members; ++b) {
    const bool skip = flags.get<Flags>(b).skip != 0;
    for (size_t i = b * leaves; i < (b + 1) * leaves; ++i) {
      const Segment& segment = segments[i];
      const Stream& param = segment.stream[kParam];
      if (segment.n == 0) continue;
      if (skip) {
        if (apart) std::memset(param.data, 0, segment.n * info_of(param.format).bytes);
        continue;
      }
      if (apart) origins[kept] = origins[i];
      segments[kept++] = segment;
    }
  }
  check(stages->sweep(rule, segments.data(), kept, own.data(), own.size(),
                      apart ? origins.data() : nullptr));
}

// -- a schedule by itself, and what is on no CPU ----------------------------------------------------

// counts -> values
void schedule(const Frame& frame) {
  const Array count = frame.argument(0), value = frame.result(0);
  of(value, count.n(), value.bytes());
  for (int64_t i = 0; i < count.n(); ++i) {
    double now;
    look_up(frame.text("text"), count.integer(i), &now, 1);
    value.put(i, now);
  }
}

void elsewhere(const Frame&) {
  throw std::invalid_argument(
      "params must be on a CPU device, got ones on a GPU: fusedstep.jax steps on the CPU");
}

template <void (*kBody)(const Frame&)>
py::capsule capsule() {
  void* const address = reinterpret_cast<void*>(handler<kBody>);
  return py::capsule(address);
}

}  // namespace

void use(const Stages* own, py::object function) {
  stages = own;
  evaluate = function.release().ptr();
}

py::dict targets() {
  py::dict all;
  all["fusedstep_measure"] = capsule<measure>();
  all["fusedstep_prepare"] = capsule<prepare>();
  all["fusedstep_sweep"] = capsule<sweep>();
  all["fusedstep_schedule"] = capsule<schedule>();
  all["elsewhere"] = capsule<elsewhere>();
  return all;
}

}  // namespace fusedstep::jax
