#include "groups.h"

#include <algorithm>
#include <stdexcept>
#include <string>

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

bool suits_matrix_unit(Makes makes, Dtype dtype, const Groups& groups, Index params, Index features) {
  // Measured on both units, over 7 layers, 32 to 128 features, 64 to 2,048 units and 1 to 16 rows: what is split
  // into parts must be used often; weights of many rows keep the vector units busy anyway, while their gradients take
  // these longer without lanes of tasks. 16-bit heads, which they have to widen, gain more.
  const Index units = groups.ragged ? groups.rows : groups.tasks, rows = groups.ragged ? 1 : groups.rows;
  if (dtype == Dtype::f64 || features < 32 || groups.rows == 0) return false;
  if (makes == Makes::gradients)
    return units >= 384 || (units >= 64 && (rows > 2 ? params >= 256 : params >= 4096 && features >= 64));
  if (rows <= 2 || dtype != Dtype::f32) return units * params >= (1 << 17);
  return units * params >= (1 << 21) && features > 96;
}

Plan default_plan(Makes makes, Dtype dtype, const Groups& groups, Index params, Index features,
                  bool matrix_unit) {
  // Held against measurement by `python -m hyperfast bench --calibrate`; plan.py has the same rule.
  const Index tasks = groups.pieces;  // what has its weights made: a task of very many rows several times
  const Index rows = groups.ragged ? groups.rows : groups.tasks * groups.rows;
  // Packing the head for so few tasks costs more than it saves, the more the larger the layer.
  if (tasks <= 4) {
    const bool tiny = makes == Makes::weights && tasks > 1 && params * features < 8192;
    return tiny ? Plan::tile : Plan::materialize;
  }
  const bool many = rows >= 48 * tasks;
  if (makes == Makes::weights) {
    if (tasks <= 16 && params >= (many ? 512 : 1024)) return Plan::materialize;
    if (many && tasks <= 64 && params >= 1024) return Plan::materialize;
  }
  // `contract` neither packs the head nor stores a weight, but every strip reads the rows of its lanes
  // again, and gradients are formed row by row; with task_ids it generates weights anew for each row.
  // 16-bit heads are packed all the same: lanes widen them, and multiply pairs of bf16. The matrix unit
  // leaves the vector units time for rows, and takes numbers of 16 bits as they are.
  const bool unit = matrix_unit && suits_matrix_unit(makes, dtype, groups, params, features);
  const bool wide = unit || dtype == Dtype::f32 || dtype == Dtype::f64;
  const Index most = makes == Makes::gradients ? (!unit ? 2 : features > 96 ? 16 : 8) : 8;
  const bool few = groups.ragged ? 4 * rows <= 5 * tasks : groups.rows <= most;
  return wide && few ? Plan::contract : Plan::tile;
}

}  // namespace hyperfast
