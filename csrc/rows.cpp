#include "rows.h"

#include <algorithm>
#include <stdexcept>
#include <string>
#include <utility>

#include "error.h"

namespace hyperfast {

Grouping Grouping::batched(Index tasks, Index rows, Index cut) {
  Grouping g;
  const Index per_task = rows > 0 ? (rows - 1) / cut + 1 : 1;  // cut may be the largest number
  g.view_ = {tasks, rows, tasks * per_task, cut, per_task};
  return g;
}

// The tasks of rows as they are now: whoever changes the ids meanwhile changes nothing here.
std::vector<Grouping::Named> Grouping::checked(const Index* ids, Index stride, Index rows,
                                               Index tasks) {
  std::vector<Named> named(rows);
  for (Index r = 0; r < rows; ++r) {
    const Index id = ids[r * stride];
    if (id < 0 || id >= tasks)
      throw std::out_of_range("task_ids must be in [0, " + std::to_string(tasks) + "), got " +
                              std::to_string(id));
    named[r] = {id, r};
  }
  return named;
}

namespace {

constexpr int digit = 8;  // bits

int digits_of(Index tasks) {
  int digits = 0;
  for (Index most = tasks - 1; most > 0; most >>= digit) ++digits;
  return digits;
}

// A request of few rows must not cost what a walk over all tasks costs: 1.5 ns a task, more where
// its memory is new (one row of 6.65 million tasks: 300 ms on a busy machine, and 4 us sorted).
bool few_rows(Index rows, Index tasks) { return 2 * rows * digits_of(tasks) < tasks; }

}  // namespace

// By digits of the task from the last to the first: 2 ns a row and digit.
void Grouping::sort_by_task(std::vector<Named>& named, Index tasks) {
  if (named.size() <= 32) {
    std::stable_sort(named.begin(), named.end(),
                     [](const Named& a, const Named& b) { return a.task < b.task; });
    return;
  }
  std::vector<Named> sorted(named.size());
  for (int d = 0; d < digits_of(tasks); ++d) {
    const auto of = [d](const Named& n) { return n.task >> (d * digit) & ((1 << digit) - 1); };
    Index begin[1 << digit] = {};
    for (const Named& n : named) ++begin[of(n)];
    Index first = 0;
    for (Index& b : begin) first += std::exchange(b, first);
    for (const Named& n : named) sorted[begin[of(n)]++] = n;
    named.swap(sorted);
  }
}

// Both ways are stable, so the order of summation does not depend on the order of tasks.
void Grouping::sort_rows(std::vector<Named>& named, Index tasks) {
  sort_by_task(named, tasks);
  const Index rows = Index(named.size());
  for (Index r = 0, first = 0; r < rows; ++r) {
    order_[r] = named[r].row;
    if (r + 1 == rows || named[r + 1].task != named[r].task) {
      cut_rows(named[r].task, first, r + 1);
      first = r + 1;
    }
  }
}

void Grouping::count_rows(const std::vector<Named>& named, Index tasks, bool all) {
  std::vector<Index> begin(tasks + 1, 0);
  for (const Named& n : named) ++begin[n.task + 1];
  for (Index t = 0; t < tasks; ++t) begin[t + 1] += begin[t];
  // Afterwards begin[t] is where task t ends.
  for (const Named& n : named) order_[begin[n.task]++] = n.row;
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
  g.order_.resize(rows);
  std::vector<Named> named = checked(ids, stride, rows, tasks);
  if (!all && few_rows(rows, tasks))
    g.sort_rows(named, tasks);
  else
    g.count_rows(named, tasks, all);
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
