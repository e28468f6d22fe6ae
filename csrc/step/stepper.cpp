// A step: check, measure, prepare the scalars, sweep, and only then count.
#include "stepper.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <stdexcept>
#include <utility>

#include "machine/float_mode.h"
#include "rules.h"

namespace fusedstep {
namespace {

void check_device(const char* error) {
  if (error) throw std::runtime_error(error);
}

bool same_place(const Stream& a, const Stream& b) {
  return a.data == b.data && a.beside == b.beside && a.format == b.format;
}

// Calls body(begin, end) with the addresses of a stream's elements, and of what is beside them.
template <class Body>
void each_part(const Segment& segment, const Stream& stream, const Body& body) {
  if (stream.format == Format::kNone || segment.n == 0) return;
  const FormatInfo& info = kFormatInfo[static_cast<int>(stream.format)];
  const auto part = [&](const void* data, int64_t bytes) {
    const auto begin = reinterpret_cast<uintptr_t>(data);
    body(begin, begin + bytes);
  };
  part(stream.data, segment.n * info.bytes);
  if (info.block > 0) part(stream.beside, beside_entries(segment, stream.format) * info.beside);
}

}  // namespace

Group as_group(const std::vector<double>& values, int rule) {
  const size_t hypers = rules()[rule].hypers.size();
  if (values.size() != hypers + 3) {
    throw std::invalid_argument("groups must have maximize, decoupled, weight_decay and " +
                                std::to_string(hypers) + " hyperparameters, got " +
                                std::to_string(values.size()) + " values");
  }
  Group group = {values[0] != 0, static_cast<int>(values[1]), values[2], {}, {}};
  std::copy(values.begin() + 3, values.end(), group.hypers);
  return group;
}

Stepper::Stepper(int rule, std::function<std::string(size_t)> name_of, const Device* device,
                 int index)
    : rule_(rule), name_of_(std::move(name_of)), device_(device) {
  if (device_) check_device(device_->open(index, &memory_));
}

Stepper::~Stepper() {
  if (memory_) device_->close(memory_);
}

std::string Stepper::describe(size_t tensor, int stream) const {
  if (stream == kParam) return "params[" + name_of_(tensor) + "]";
  if (stream == kGrad) return "grads[" + name_of_(tensor) + "]";
  if (stream == kShadow) return "shadow[" + name_of_(tensor) + "]";
  if (stream == kEma) return "state[" + name_of_(tensor) + "]['ema']";
  return "state[" + name_of_(tensor) + "]['" + rules()[rule_].states[stream - kState] + "']";
}

bool Stepper::in_place(const std::vector<Tensor>& tensors) const {
  return std::equal(tensors.begin(), tensors.end(), tensors_.begin(), tensors_.end(),
                    [](const Tensor& a, const Tensor& b) {
                      bool same = a.segment.n == b.segment.n && a.segment.first == b.segment.first;
                      for (int k = 0; same && k < kStreams; ++k) {
                        same = k == kGrad || same_place(a.segment.stream[k], b.segment.stream[k]);
                      }
                      return same;
                    });
}

void Stepper::set_tensors(const std::vector<Tensor>& tensors) {
  if (in_place(tensors)) {
    tensors_ = tensors;
    return;
  }
  std::vector<Range> written;
  for (size_t i = 0; i < tensors.size(); ++i) {
    const Segment& segment = tensors[i].segment;
    for (int k = 0; k < kShadow; ++k) {
      if (k == kGrad) continue;
      each_part(segment, segment.stream[k],
                [&](uintptr_t begin, uintptr_t end) { written.push_back({begin, end, i, k}); });
    }
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
  put_back({tensors, std::move(written), std::vector<Stream>(tensors.size())});
}

Stepper::Kept Stepper::keep() const { return {tensors_, written_, clear_}; }

void Stepper::put_back(Kept kept) noexcept {
  tensors_ = std::move(kept.tensors);
  written_ = std::move(kept.written);
  clear_ = std::move(kept.clear);
}

// Brings home the clocks that the device alone has advanced.
void Stepper::fetch_clocks() {
  std::vector<size_t> entered;
  std::vector<int64_t> slots;
  for (size_t i = 0; i < tensors_.size(); ++i) {
    if (!tensors_[i].entered) continue;
    entered.push_back(i);
    slots.push_back(tensors_[i].slot);
  }
  if (slots.empty()) return;
  std::vector<Clock> clocks(slots.size());
  std::vector<int> begins(slots.size());
  check_device(
      device_->read_clocks(memory_, slots.data(), slots.size(), clocks.data(), begins.data()));
  for (size_t k = 0; k < entered.size(); ++k) {
    Tensor& tensor = tensors_[entered[k]];
    tensor.counted.clock = clocks[k];
    tensor.segment.ema_begins |= begins[k];
    tensor.entered = false;
  }
}

std::vector<Clock> Stepper::clocks() {
  fetch_clocks();
  std::vector<Clock> all;
  for (const Tensor& t : tensors_) all.push_back(t.counted.clock);
  return all;
}

std::vector<Clock> Stepper::device_clocks(const std::vector<int64_t>& slots) const {
  std::vector<Clock> clocks(slots.size());
  check_device(device_->read_clocks(memory_, slots.data(), slots.size(), clocks.data(), nullptr));
  return clocks;
}

double Stepper::device_norm() const {
  double norm;
  check_device(device_->read_norm(memory_, &norm));
  return norm;
}

// That stream k of a tensor lies outside of all that every step writes.
void Stepper::check_apart(const Stream& stream, size_t tensor, int k) {
  each_part(segments_[tensor], stream, [&](uintptr_t begin, uintptr_t end) {
    const auto next = std::upper_bound(written_.begin(), written_.end(), begin,
                                       [](uintptr_t at, const Range& r) { return at < r.end; });
    if (next != written_.end() && next->begin < end) {
      throw std::invalid_argument(describe(tensor, k) + " must not share memory with " +
                                  describe(next->tensor, next->stream) +
                                  ", got overlapping buffers");
    }
  });
}

// That what this step alone writes, copies and gradients that become zero, lies apart.
void Stepper::check_extra(const Options& options) const {
  std::vector<Range> all;
  for (size_t i = 0; i < segments_.size(); ++i) {
    for (const int k : {kGrad, kShadow}) {
      each_part(segments_[i], segments_[i].stream[k],
                [&](uintptr_t begin, uintptr_t end) { all.push_back({begin, end, i, k}); });
    }
  }
  std::sort(all.begin(), all.end(),
            [](const Range& a, const Range& b) { return a.begin < b.begin; });
  const Range *reaches = nullptr, *written = nullptr;  // the furthest so far
  for (const Range& range : all) {
    const bool writes = range.stream == kShadow || options.zero_grad;
    const Range* before = writes ? reaches : written;
    if (before && before->end > range.begin) {
      throw std::invalid_argument(
          describe(before->tensor, before->stream) + " must not share memory with " +
          describe(range.tensor, range.stream) + ", got overlapping buffers");
    }
    if (!reaches || range.end > reaches->end) reaches = &range;
    if (writes && (!written || range.end > written->end)) written = &range;
  }
}

// Nothing is written before all of it holds.
void Stepper::check(const std::vector<Stream>& grads, const std::vector<Group>& groups,
                    const Options& options, const std::vector<Stream>& shadows) {
  const Rule& rule = rules()[rule_];
  segments_.resize(tensors_.size());
  for (size_t i = 0; i < grads.size(); ++i) {
    Segment& segment = segments_[i];
    // A call, as the string instruction that GCC makes of an assignment is slow to start.
    std::memmove(&segment, &tensors_[i].segment, sizeof(segment));
    segment.stream[kGrad] = grads[i];
    if (!options.average) segment.stream[kEma] = {};
    if (!shadows.empty() && shadows[i].format != Format::kNone) {
      segment.stream[kShadow] = shadows[i];
      check_apart(shadows[i], i, kShadow);
    }
    const Stream& grad = grads[i];
    if (!takes_part(segment) || segment.n == 0) continue;
    const StateMask mask = rule.mask_of(groups[tensors_[i].counted.group].hypers);
    for (size_t s = 0; s < rule.states.size(); ++s) {
      const int stream = kState + static_cast<int>(s);
      if (!(mask >> s & 1)) {
        segment.stream[stream] = {};
      } else if (segment.stream[stream].format == Format::kNone) {
        throw std::logic_error(describe(i, stream) + " is missing");
      }
    }
    if (!grad.data) {
      throw std::invalid_argument("grads[" + name_of_(i) + "] must have memory, got none");
    }
    if (same_place(grad, clear_[i])) continue;
    check_apart(grad, i, kGrad);
    clear_[i] = grad;
  }
  if (!shadows.empty() || options.zero_grad) check_extra(options);
}

// What becomes of the gradients, from their norm where that is wanted.
Verdict Stepper::measure(const Options& options, Measured& measured) const {
  const auto* found_inf = static_cast<const float*>(options.found_inf.data);  // on the CPU
  const bool found = found_inf && *found_inf != 0;
  if (!options.measure) return {0, options.factor, found};
  measured = fusedstep::measure(segments_);
  return judge(measured.all.sum, !measured.all.finite, found, options);
}

std::vector<std::optional<Norm>> Stepper::norms() const {
  std::vector<std::optional<Norm>> all;
  if (device_) {
    const auto n = std::count(measured_there_.begin(), measured_there_.end(), true);
    std::vector<double> norms(n);
    std::vector<int> finite(n);
    check_device(device_->read_norms(memory_, norms.size(), norms.data(), finite.data()));
    size_t next = 0;
    for (const std::optional<bool>& elements : measured_there_) {
      Norm norm = {0, true};
      if (elements == true) {
        norm = {norms[next], finite[next] != 0};
        ++next;
      }
      all.push_back(elements ? std::optional(norm) : std::nullopt);
    }
    return all;
  }
  for (const std::optional<Squared>& squared : measured_.each) {
    all.push_back(squared ? std::optional(Norm{std::sqrt(squared->sum) * factor_, squared->finite})
                          : std::nullopt);
  }
  return all;
}

void Stepper::prepare(const std::vector<Group>& groups, double factor, const Options& options) {
  counted_.clear();
  for (const Tensor& tensor : tensors_) counted_.push_back(tensor.counted);
  plan_.make(rule_, counted_, groups, factor, options, segments_);
}

void Stepper::sweep_there(const std::vector<Group>& groups, const Options& options) {
  there_.clear();
  for (size_t i = 0; i < tensors_.size(); ++i) {
    if (!is_written(segments_[i])) continue;
    const Tensor& t = tensors_[i];
    DeviceTensor& there = there_.emplace_back();
    there.segment = segments_[i];
    there.segment.ema_begins = t.segment.ema_begins;  // as fetch_clocks() may have found
    there.states = rules()[rule_].mask_of(groups[t.counted.group].hypers);
    there.counts = takes_part(segments_[i]);
    if (options.live) there.segment.row = t.counted.group;
    there.slot = t.slot;
    there.enters = !t.entered;
    there.clock = t.counted.clock;
    std::copy(t.shown.begin(), t.shown.end(), there.shown);
  }
  const std::vector<Row> none;
  const std::vector<Row>& rows = options.live ? none : plan_.rows();
  const DeviceStep step = {rule_,
                           there_.data(),
                           there_.size(),
                           rows.data(),
                           rows.size(),
                           groups.data(),
                           options.live ? groups.size() : 0,
                           options};
  std::vector<std::optional<bool>> measured;
  for (size_t i = 0; options.measure && i < segments_.size(); ++i) {
    const bool counts = takes_part(segments_[i]);
    measured.push_back(counts ? std::optional(segments_[i].n > 0) : std::nullopt);
  }
  check_device(device_->step(memory_, &step));
  if (options.measure) measured_there_ = std::move(measured);
}

void Stepper::commit(const Options& options, Outcome& outcome) {
  for (size_t i = 0; i < tensors_.size(); ++i) {
    if (options.average) tensors_[i].segment.ema_begins = 0;
    if (is_written(segments_[i])) tensors_[i].entered = options.live;
    if (!takes_part(segments_[i])) continue;
    if (!options.live) tensors_[i].counted.clock = plan_.after(segments_[i]);
    outcome.elements += tensors_[i].segment.n;
  }
}

Outcome Stepper::step(const std::vector<Stream>& grads, const std::vector<Group>& groups,
                      const Options& options, const std::vector<Stream>& shadows) {
  // For the scalars and the sweep; the pool's threads, which are made in here, inherit it (POSIX,
  // pthread_create).
  const FloatMode mode;
  check(grads, groups, options, shadows);
  Outcome outcome;
  Measured measured;
  const auto note = [&] {  // as norms() tells it: not of a step that fails
    if (device_ || !options.measure) return;
    measured_ = std::move(measured);
    factor_ = options.factor;
  };
  double factor = options.factor;
  if (!device_) {
    const Verdict verdict = measure(options, measured);
    outcome.norm = verdict.norm;
    outcome.skipped = verdict.skip != 0;
    if (outcome.skipped) {
      note();
      return outcome;
    }
    factor = verdict.factor;
  } else {  // which measures, and then multiplies, itself
    if (!options.live) fetch_clocks();
    if (options.live || options.measure) factor = 1;
  }
  if (!options.live) prepare(groups, factor, options);
  if (device_) {
    sweep_there(groups, options);
  } else {
    run(rule_, segments_, plan_.rows());
  }
  commit(options, outcome);
  note();
  return outcome;
}

}  // namespace fusedstep
