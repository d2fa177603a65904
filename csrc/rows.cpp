#include "rows.h"

#include <algorithm>
#include <stdexcept>
#include <string>

#include "error.h"

namespace hyperfast {

Grouping Grouping::batched(Index tasks, Index rows, Index cut) {
  Grouping g;
  const Index per_task = std::max<Index>((rows + cut - 1) / cut, 1);
  g.view_ = {tasks, rows, tasks * per_task, cut, per_task};
  return g;
}

Grouping Grouping::ragged(const Index* ids, Index stride, Index rows, Index tasks, Index cut,
                          bool all) {
  Grouping g;
  // Counting sort: stable, so the order of summation does not depend on the order of tasks.
  std::vector<Index> begin(tasks + 1, 0);
  for (Index r = 0; r < rows; ++r) {
    const Index id = ids[r * stride];
    if (id < 0 || id >= tasks)
      throw std::out_of_range("task_ids must be in [0, " + std::to_string(tasks) + "), got " +
                              std::to_string(id));
    ++begin[id + 1];
  }
  for (Index t = 0; t < tasks; ++t) begin[t + 1] += begin[t];
  g.order_.resize(rows);
  for (Index r = 0; r < rows; ++r) {
    // Afterwards begin[t] is where task t ends.
    g.order_[begin[ids[r * stride]]++] = r;
  }
  Index first = 0;
  for (Index t = 0; t < tasks; ++t) {
    const Index last = begin[t];
    if (all && first == last) g.pieces_.push_back({t, first, last});
    for (Index i = first; i < last; i += std::min(cut, last - i))
      g.pieces_.push_back({t, i, i + std::min(cut, last - i)});
    first = last;
  }
  g.view_ = {tasks, rows, Index(g.pieces_.size()), cut, 1, true, g.order_.data(), g.pieces_.data()};
  return g;
}

Groups Grouping::assumed(bool ragged, Index tasks, Index rows, Index cut) {
  if (tasks < 0 || rows < 0) fail("tasks and rows must not be negative");
  const Index named = ragged ? std::min(tasks, rows) : tasks;
  Groups g = batched(named, named ? (rows + named - 1) / named : 0, cut).view();
  if (!ragged) return g;
  g.tasks = tasks;
  g.rows = rows;
  g.ragged = true;
  return g;
}

}  // namespace hyperfast
