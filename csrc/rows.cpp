#include "rows.h"

#include <algorithm>
#include <stdexcept>
#include <string>
#include <utility>

#include "error.h"

namespace hyperfast {

Grouping Grouping::batched(Index tasks, Index rows, Index cut) {
  Grouping g;
  const Index per_task = std::max<Index>((rows + cut - 1) / cut, 1);
  g.view_ = {tasks, rows, tasks * per_task, cut, per_task};
  return g;
}

namespace {

// Ids of rows that are given one by one.
struct Ids {
  const Index* data;
  Index stride, rows, tasks;

  Index operator[](Index r) const {
    const Index id = data[r * stride];
    if (id < 0 || id >= tasks)
      throw std::out_of_range("task_ids must be in [0, " + std::to_string(tasks) + "), got " +
                              std::to_string(id));
    return id;
  }
};

// A request of few rows must not cost what a walk over all tasks costs: 1.5 ns a task, more where
// its memory is new (one row of 6.65 million tasks: 300 ms on a busy machine, and 4 us sorted). To
// sort takes about 6 ns a row and doubling of rows (1,000 rows: 60 us).
bool few_rows(const Ids& ids) {
  Index steps = 1;
  for (Index n = ids.rows; n > 1; n /= 2) ++steps;
  return 2 * ids.rows * steps < ids.tasks;
}

}  // namespace

// Both ways are stable, so the order of summation does not depend on the order of tasks.
void Grouping::sort_rows(const Index* data, Index stride, Index rows, Index tasks) {
  const Ids ids{data, stride, rows, tasks};
  std::vector<std::pair<Index, Index>> sorted(rows);  // all different: the row is part of it
  for (Index r = 0; r < rows; ++r) sorted[r] = {ids[r], r};
  std::sort(sorted.begin(), sorted.end());
  order_.resize(rows);
  for (Index r = 0; r < rows; ++r) order_[r] = sorted[r].second;
  for (Index r = 0, first = 0; r < rows; ++r)
    if (r + 1 == rows || sorted[r + 1].first != sorted[r].first) {
      cut_rows(sorted[r].first, first, r + 1);
      first = r + 1;
    }
}

void Grouping::count_rows(const Index* data, Index stride, Index rows, Index tasks, bool all) {
  const Ids ids{data, stride, rows, tasks};
  std::vector<Index> begin(tasks + 1, 0);
  for (Index r = 0; r < rows; ++r) ++begin[ids[r] + 1];
  for (Index t = 0; t < tasks; ++t) begin[t + 1] += begin[t];
  order_.resize(rows);
  // Afterwards begin[t] is where task t ends.
  for (Index r = 0; r < rows; ++r) order_[begin[data[r * stride]]++] = r;
  Index first = 0;
  for (Index t = 0; t < tasks; ++t) {
    if (all && first == begin[t]) pieces_.push_back({t, first, first});
    cut_rows(t, first, begin[t]);
    first = begin[t];
  }
}

void Grouping::cut_rows(Index task, Index first, Index last) {
  for (Index i = first; i < last; i += std::min(view_.cut, last - i))
    pieces_.push_back({task, i, i + std::min(view_.cut, last - i)});
}

Grouping Grouping::ragged(const Index* ids, Index stride, Index rows, Index tasks, Index cut,
                          bool all) {
  Grouping g;
  g.view_.cut = cut;
  if (!all && few_rows({ids, stride, rows, tasks}))
    g.sort_rows(ids, stride, rows, tasks);
  else
    g.count_rows(ids, stride, rows, tasks, all);
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
