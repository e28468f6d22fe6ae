// A step: check, measure, prepare the scalars, sweep, and only then count.
#include "stepper.h"

#include <algorithm>
#include <cstring>
#include <stdexcept>

#include "machine/dispatch.h"
#include "machine/float_mode.h"
#include "machine/parallel.h"
#include "norm.h"

namespace fusedstep {
namespace {

// Pieces of a segment start at multiples of this many elements, whole registers and cache lines.
constexpr int64_t kPiece = 64;

// Elements that one thread takes at a time: a few dozen pieces for each, so that a slow core takes
// fewer, within these bounds. A step below kAlone, some 40 us long, is over on the calling thread
// before another has woken up.
constexpr int64_t kLeastGrain = 1 << 15, kMostGrain = 1 << 18, kAlone = 1 << 17;

int64_t grain_for(int64_t n) {
  if (n < kAlone) return n;
  return std::max(kLeastGrain, std::min(kMostGrain, n / num_threads() / 32 / kPiece * kPiece));
}

void check(const char* error) {  // of a device
  if (error) throw std::runtime_error(error);
}

// Whether two clocks are the same, as bytes: NaN is NaN.
// NOLINTNEXTLINE(bugprone-suspicious-memory-comparison): it has no padding
bool same(const Clock& a, const Clock& b) { return std::memcmp(&a, &b, sizeof(a)) == 0; }

// Spread over all 64 bits of which the low ones are used.
uint64_t hash(int group, const Clock& clock) {
  uint64_t words[sizeof(clock) / sizeof(uint64_t)], result = static_cast<uint64_t>(group);
  std::memcpy(words, &clock, sizeof(clock));
  for (const uint64_t word : words) {
    result = (result ^ word) * 0x9e3779b97f4a7c15u;  // 2^64 / the golden ratio, as Knuth has it
    result ^= result >> 32;
  }
  return result;
}

int64_t round_up(int64_t at, int64_t n) { return std::min(n, (at + kPiece - 1) / kPiece * kPiece); }

// All segments end to end: [starts[i], starts[i+1]) are segment i's elements.
void sweep(const std::vector<Segment>& segments, std::vector<int64_t>& starts) {
  starts.assign(1, 0);
  for (const Segment& segment : segments) starts.push_back(starts.back() + segment.n);
  parallel_for(starts.back(), grain_for(starts.back()), [&](int64_t begin, int64_t end) {
    auto i = std::upper_bound(starts.begin(), starts.end(), begin) - starts.begin() - 1;
    for (; i < static_cast<int64_t>(segments.size()) && starts[i] < end; ++i) {
      const Segment& segment = segments[i];
      const int64_t from = round_up(std::max<int64_t>(0, begin - starts[i]), segment.n);
      const int64_t to = round_up(std::min(segment.n, end - starts[i]), segment.n);
      if (from < to) segment.kernel(segment, from, to);
    }
  });
}

}  // namespace

const char* dtype_name(DType dtype) {
  constexpr const char* names[] = {"float32", "float64", "bfloat16", "float16"};
  return names[static_cast<int>(dtype)];
}

int64_t dtype_bytes(DType dtype) {
  constexpr int64_t bytes[] = {4, 8, 2, 2};
  return bytes[static_cast<int>(dtype)];
}

DType state_dtype(DType param) { return param == DType::f64 ? DType::f64 : DType::f32; }

int type_pair(DType param, DType grad) {
  for (int i = 0; i < kPairs; ++i) {
    if (kTypePairs[i].param == param && kTypePairs[i].grad == grad) return i;
  }
  return -1;
}

Group as_group(const std::vector<double>& values, int rule) {
  const size_t hypers = rules()[rule].hypers.size();
  if (values.size() != hypers + 3) {
    throw std::invalid_argument("groups must have maximize, decoupled, weight_decay and " +
                                std::to_string(hypers) + " hyperparameters, got " +
                                std::to_string(values.size()) + " values");
  }
  Group group = {values[0] != 0, values[1] != 0, values[2], {}};
  std::copy(values.begin() + 3, values.end(), group.hypers);
  return group;
}

StepTable::StepTable(int rule, std::function<std::string(size_t)> name_of, const Device* device,
                     int index)
    : rule_(rule), name_of_(std::move(name_of)), device_(device) {
  if (device_) check(device_->open(index, &memory_));
}

StepTable::~StepTable() {
  if (memory_) device_->close(memory_);
}

std::string StepTable::describe(size_t tensor, int stream) const {
  if (stream < 0) return "params[" + name_of_(tensor) + "]";
  return "state[" + name_of_(tensor) + "]['" + rules()[rule_].states[stream] + "']";
}

bool StepTable::in_place(const std::vector<Tensor>& tensors) const {
  return std::equal(tensors.begin(), tensors.end(), tensors_.begin(), tensors_.end(),
                    [](const Tensor& a, const Tensor& b) {
                      return a.param == b.param && a.n == b.n && a.dtype == b.dtype &&
                             a.state == b.state;
                    });
}

void StepTable::set_tensors(const std::vector<Tensor>& tensors) {
  if (in_place(tensors)) {
    tensors_ = tensors;
    return;
  }
  std::vector<Range> written;
  for (size_t i = 0; i < tensors.size(); ++i) {
    const Tensor& t = tensors[i];
    const auto add = [&](void* data, DType dtype, int stream) {
      const auto begin = reinterpret_cast<uintptr_t>(data);
      if (data && t.n > 0) written.push_back({begin, begin + t.n * dtype_bytes(dtype), i, stream});
    };
    add(t.param, t.dtype, -1);
    for (int s = 0; s < kMaxStates; ++s) add(t.state[s], state_dtype(t.dtype), s);
  }
  std::sort(written.begin(), written.end(),
            [](const Range& a, const Range& b) { return a.begin < b.begin; });
  const Range* shared = nullptr;  // with the one after it; a pair of parameters says the most
  for (size_t i = 0; i + 1 < written.size(); ++i) {
    if (written[i].end <= written[i + 1].begin) continue;
    if (!shared || written[i].stream < shared->stream) shared = &written[i];
  }
  if (shared) {
    const bool in_order = shared[0].tensor <= shared[1].tensor;
    const Range &first = shared[in_order ? 0 : 1], &second = shared[in_order ? 1 : 0];
    throw std::invalid_argument(describe(first.tensor, first.stream) + " and " +
                                describe(second.tensor, second.stream) +
                                " must not share memory, got overlapping buffers");
  }
  tensors_ = tensors;
  written_ = std::move(written);
  clear_.assign(tensors.size(), Grad{});
}

// Brings home the clocks that the device alone has advanced.
void StepTable::fetch_clocks() {
  std::vector<size_t> entered;
  std::vector<int64_t> slots;
  for (size_t i = 0; i < tensors_.size(); ++i) {
    if (!tensors_[i].entered) continue;
    entered.push_back(i);
    slots.push_back(tensors_[i].slot);
  }
  if (slots.empty()) return;
  const std::vector<Clock> clocks = device_clocks(slots);
  for (size_t k = 0; k < entered.size(); ++k) {
    tensors_[entered[k]].clock = clocks[k];
    tensors_[entered[k]].entered = false;
  }
}

std::vector<Clock> StepTable::clocks() {
  fetch_clocks();
  std::vector<Clock> all;
  for (const Tensor& t : tensors_) all.push_back(t.clock);
  return all;
}

std::vector<Clock> StepTable::device_clocks(const std::vector<int64_t>& slots) const {
  std::vector<Clock> clocks(slots.size());
  check(device_->read_clocks(memory_, slots.data(), slots.size(), clocks.data()));
  return clocks;
}

double StepTable::device_norm() const {
  double norm;
  check(device_->read_norm(memory_, &norm));
  return norm;
}

void StepTable::check_overlap(const std::vector<Grad>& grads) {
  for (size_t i = 0; i < grads.size(); ++i) {
    const Tensor& t = tensors_[i];
    const Grad& grad = grads[i];
    if (!grad.given || t.n == 0) continue;
    if (!grad.data) {
      throw std::invalid_argument("grads[" + name_of_(i) + "] must have memory, got none");
    }
    if (grad.data == clear_[i].data && grad.dtype == clear_[i].dtype) continue;
    const auto begin = reinterpret_cast<uintptr_t>(grad.data);
    const uintptr_t end = begin + t.n * dtype_bytes(grad.dtype);
    const auto next = std::upper_bound(written_.begin(), written_.end(), begin,
                                       [](uintptr_t at, const Range& r) { return at < r.end; });
    if (next != written_.end() && next->begin < end) {
      throw std::invalid_argument("grads[" + name_of_(i) + "] must not share memory with " +
                                  describe(next->tensor, next->stream) +
                                  ", got overlapping buffers");
    }
    clear_[i] = grad;
  }
}

// What becomes of the gradients, from their norm where that is wanted.
Verdict StepTable::measure(const std::vector<Grad>& grads, const Control& control) const {
  const auto* found_inf = static_cast<const float*>(control.found_inf.at);  // on the CPU
  const bool found = found_inf && *found_inf != 0;
  if (!control.measure) return {0, control.factor, found};
  std::vector<Run> runs;
  for (size_t i = 0; i < grads.size(); ++i) {
    if (grads[i].given) runs.push_back({grads[i].data, tensors_[i].n, grads[i].dtype});
  }
  const Squared squared = sum_of_squares(runs);
  return judge(squared.sum, !squared.finite, found, control);
}

// The row of a tensor: one for each group and clock, in whatever order the tensors come.
int StepTable::row_of(const Tensor& tensor, const Group& group, double factor) {
  size_t at = hash(tensor.group, tensor.clock);
  for (;; ++at) {
    int& row = row_at_[at &= row_at_.size() - 1];
    if (row < 0) {
      row = static_cast<int>(rows_.size());
      Prepared& made = prepared_.emplace_back(Prepared{tensor.group, tensor.clock, tensor.clock});
      rows_.push_back(rules()[rule_].prepare(group, made.after, factor));
      return row;
    }
    if (prepared_[row].group == tensor.group && same(prepared_[row].before, tensor.clock)) {
      return row;
    }
  }
}

// Which tensors the step has, and their rows, unless the device is to prepare those.
void StepTable::plan(const std::vector<Grad>& grads, const std::vector<DeviceGroup>& groups,
                     bool live, double factor) {
  const Rule& rule = rules()[rule_];
  parts_.clear();
  rows_.clear();
  prepared_.clear();
  size_t places = 1;
  while (places < 2 * tensors_.size()) places *= 2;
  row_at_.assign(live ? 0 : places, -1);
  advanced_.resize(tensors_.size());
  for (size_t i = 0; i < tensors_.size(); ++i) {
    const Tensor& t = tensors_[i];
    advanced_[i] = t.clock;
    if (!grads[i].given) continue;
    const Group& group = groups[t.group].group;
    Part part = {i, t.group, used_states(rule, group.hypers)};
    if (!live) {
      part.row = row_of(t, group, factor);
      advanced_[i] = prepared_[part.row].after;
    }
    for (int s = 0; s < kMaxStates && t.n > 0; ++s) {
      if (part.uses >> s & 1 && !t.state[s]) throw std::logic_error(describe(i, s) + " is missing");
    }
    parts_.push_back(part);
  }
}

void StepTable::sweep_here(const std::vector<Grad>& grads) {
  const auto& kernel_of = kernels().find[rule_];
  segments_.clear();
  for (const Part& part : parts_) {
    const Tensor& t = tensors_[part.tensor];
    const Grad& grad = grads[part.tensor];
    if (t.n == 0) continue;
    const Row& row = rows_[part.row];
    Segment segment = {
        t.param, grad.data,   {},
        t.n,     row.scalars, kernel_of[row.variant][row.decay][type_pair(t.dtype, grad.dtype)]};
    for (int s = 0; s < kMaxStates; ++s) {
      if (part.uses >> s & 1) segment.state[s] = t.state[s];
    }
    segments_.push_back(segment);
  }
  sweep(segments_, starts_);
}

void StepTable::sweep_there(const std::vector<Grad>& grads, const std::vector<DeviceGroup>& groups,
                            const Control& control) {
  there_.clear();
  for (const Part& part : parts_) {
    const Tensor& t = tensors_[part.tensor];
    const Grad& grad = grads[part.tensor];
    DeviceTensor& there = there_.emplace_back();
    there = {t.param, grad.data,  {},      t.n, type_pair(t.dtype, grad.dtype), part.uses, part.row,
             t.slot,  !t.entered, t.clock, {}};
    std::copy(t.state.begin(), t.state.end(), there.state);
    std::copy(t.shown.begin(), t.shown.end(), there.shown);
  }
  const DeviceStep step = {rule_,
                           there_.data(),
                           there_.size(),
                           rows_.data(),
                           rows_.size(),
                           groups.data(),
                           control.live ? groups.size() : 0,
                           control};
  check(device_->step(memory_, &step));
  for (const Part& part : parts_) tensors_[part.tensor].entered = control.live;
}

Outcome StepTable::step(const std::vector<Grad>& grads, const std::vector<DeviceGroup>& groups,
                        const Control& control) {
  // For the scalars and the sweep; the pool's threads, which are made in here, inherit it (POSIX,
  // pthread_create).
  const FloatMode mode;
  check_overlap(grads);
  Outcome outcome = {0, false, 0};
  double factor = control.factor;
  if (device_) {
    if (!control.live) fetch_clocks();
    if (control.live || control.measure) factor = 1;  // the device multiplies
  } else {
    const Verdict verdict = measure(grads, control);
    outcome.norm = verdict.norm;
    outcome.skipped = verdict.skip != 0;
    if (outcome.skipped) return outcome;
    factor = verdict.factor;
  }
  plan(grads, groups, control.live, factor);
  if (device_) {
    sweep_there(grads, groups, control);
  } else {
    sweep_here(grads);
  }
  for (const Part& part : parts_) {
    if (!control.live) tensors_[part.tensor].clock = advanced_[part.tensor];
    outcome.elements += tensors_[part.tensor].n;
  }
  return outcome;
}

}  // namespace fusedstep
