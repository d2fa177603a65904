// What the ops check alike: that sizes can be counted, and how rows belong to tasks.
#pragma once

#include <optional>

#include "rows.h"
#include "torch/argument.h"

namespace hyperfast {

using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

// What a layer of these sizes makes for so many tasks.
inline void countable(Index tasks, Index out, Index in, Index features = 0) {
  const double params = double(out) * (double(in) + 1);
  countable(params * (double(tasks) + 1));
  countable(params * (double(features) + 1));
  countable((double(tasks) + 1) * (double(features) + 1));
}

// Rows of x with so many columns.
inline void countable_rows(const Arg& x, Index columns) {
  double rows = 1;
  for (Index i = 0; i + 1 < x.dim(); ++i) rows *= double(x.size(i)) + 1;
  countable(rows * (double(columns) + 1));
}

// The layout of x (and of everything shaped like it): (B, N, columns), or (R, columns) with
// task_ids.
inline Grouping group_rows(const Arg& x, const OptionalTensor& task_ids, Index tasks,
                           Index cut = given_piece, bool all = false) {
  if (!task_ids) {
    x.rank(3, "(B, N, columns)");
    x.size(0, tasks, "tasks");
    countable_rows(x, x.size(2));
    return Grouping::batched(tasks, x.size(1), cut);
  }
  x.rank(2, "(R, columns), as task_ids is given");
  countable_rows(x, x.size(1));
  const Arg ids("task_ids", *task_ids);
  ids.is(torch::headeronly::ScalarType::Long);
  ids.rank(1, "(R,)");
  ids.size(0, x.size(0), "one for each row of x");
  return Grouping::ragged(ids.data<const Index>(), ids.stride(0), x.size(0), tasks, cut, all);
}

// x, or a contiguous copy, where kernels would read columns that lie apart so often that the copy
// takes less time. `sums` over rows, the gradients of weights, walk over x more often than what is
// one product a row. Measured with 8 to 2,048 rows of 64 columns a task:
// - rows by task_ids, as columns of a (64, 16,384) matrix: 15 to 9 ms (task_linear), 17 to 4 ms
//   (gradient of weights), as each column is in a line of its own, which other rows fetch again;
// - sums where neither rows nor columns lie side by side: 30 to 12 ms (512 tasks of 32 rows);
// - sums where less than a line of rows does: 12 to 4 ms (512 tasks of 8 rows);
// - products where each column of a row is in a line of its own: 156 to 50 ms (862 tasks of 16 rows
//   of 336 columns, tasks side by side).
// Elsewhere kernels read what they need at once, and the copy costs more than it saves: 3 against 4
// ms (task_linear, rows side by side in 512 tasks of 32).
inline Tensor readable(const Arg& x, const OptionalTensor& task_ids, bool sums) {
  const Index columns = x.size(-1), column = x.stride(-1);
  if (column <= 1 || columns <= 1 || x.tensor().numel() < 4096) return x.tensor();
  const bool side_by_side = x.stride(-2) == 1 && x.size(-2) >= 16;
  const bool apart = column * Index(x.tensor().element_size()) >= 64;
  if (!task_ids && (side_by_side || !(sums || apart))) return x.tensor();
  return as_contiguous(x.tensor());
}

}  // namespace hyperfast
