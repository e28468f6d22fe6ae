// The arithmetic of a step over plain memory: functions of segments, clocks and groups. What lasts from
// one step to the next is the stepper's.
#pragma once

#include <cstdint>
#include <optional>
#include <vector>

#include "interface/clock.h"
#include "interface/group.h"
#include "interface/kernels.h"
#include "interface/options.h"

namespace fusedstep {

const char* format_name(Format format);
int64_t format_bytes(Format format);
Format state_format(Format param);  // float64 under float64, else float32
// Entries beside a segment's stream of a format that has such.
int64_t beside_entries(const Segment& segment, Format format);

// Writes elements [begin, end) of one stream into another, rounded to nearest, where `first` is the
// place of their first one. Blocks that share what lies beside them are converted whole.
void convert(const Stream& from, const Stream& to, int64_t begin, int64_t end, int64_t first = 0);

// Whether a tensor takes part in an update: it has a gradient.
bool takes_part(const Segment& segment);
// Whether a step writes anything of it: without a gradient an average and a copy of the parameter.
bool is_written(const Segment& segment);

// Measure. A sum of squares, and whether all elements are finite: a sum of float64 squares may be
// infinite although they are.
struct Squared {
  double sum = 0;
  bool finite = true;
};
struct Measured {
  std::vector<std::optional<Squared>> each;  // by segment, of those that take part
  Squared all;
};

// The gradients', as the step reads them: float64 ones are rounded to float32 unless the parameter is
// float64 too. A tensor's blocks are padded with zeros to a power of two and added in pairs, level
// by level; then the sums of the tensors that have elements, in the same way.
Measured measure(const std::vector<Segment>& segments);

// Prepare. A tensor's group, and its clock before the step.
struct Counted {
  int group;
  Clock clock;
};

// One row for each group and clock that occur, whatever the order of the tensors.
class Plan {
 public:
  // Prepares the rows of a rule's next update, tells each segment its own, and which clock follows.
  void make(int rule, const std::vector<Counted>& counted, const std::vector<Group>& groups,
            double factor, const Options& options, std::vector<Segment>& segments);

  const std::vector<Row>& rows() const { return rows_; }
  const Clock& after(const Segment& segment) const { return prepared_[segment.row].after; }

 private:
  int row_of(int rule, const Counted& counted, const Group& group, double factor,
             const Options& options);

  struct Prepared {  // what a row was prepared from, and the clock that follows
    int group;
    Clock before, after;
  };
  std::vector<Row> rows_;
  std::vector<Prepared> prepared_;  // of rows_
  std::vector<int> row_at_;         // by hash, or -1: rows_ found again; its size is a power of two
};

// Sweep. Updates all segments that are written, in one parallel region. Where there are origins, one
// for each segment, the parameters are read from there, in the segment's format, and the segment gets
// what is to be added to them, also where its gradient lies.
void run(int rule, const std::vector<Segment>& segments, const std::vector<Row>& rows,
         const std::vector<const void*>& origins = {});

}  // namespace fusedstep
