#include "plan.h"

#include <algorithm>

namespace hyperfast {
namespace {

Index total_rows(const Groups& groups) {
  return groups.ragged ? groups.rows : groups.tasks * groups.rows;
}

}  // namespace

bool suits_matrix_unit(Makes makes, Dtype dtype, const Groups& groups, Index params,
                       Index features) {
  // Measured on both units, over 7 layers, 32 to 128 features, 64 to 2,048 units and 1 to 16 rows:
  // what is split into parts must be used often; weights of many rows keep the vector units busy
  // anyway, while their gradients take these longer without lanes of tasks. 16-bit heads, which
  // they have to widen, gain more.
  const Index units = groups.ragged ? groups.rows : groups.tasks,
              rows = groups.ragged ? 1 : groups.rows;
  if (dtype == Dtype::f64 || features < 32 || groups.rows == 0) return false;
  if (makes == Makes::gradients)
    return units >= 384 ||
           (units >= 64 && (rows > 2 ? params >= 256 : params >= 4096 && features >= 64));
  if (rows <= 2 || dtype != Dtype::f32) return units * params >= (1 << 17);
  return units * params >= (1 << 21) && features > 96;
}

Plan default_plan(Makes makes, Dtype dtype, const Groups& groups, Index params, Index features,
                  bool matrix_unit, bool pairs) {
  // Held against measurement by `python -m hyperfast bench --calibrate`.
  const Index tasks =
      groups.pieces;  // what has its weights made: a task of very many rows several times
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
  // `contract` neither packs the head nor stores a weight, but every strip reads the rows of its
  // lanes again, and gradients are formed row by row; with task_ids it generates weights anew for
  // each row. Gradients of 16-bit heads are packed. The matrix unit leaves the vector units time
  // for rows, and takes numbers of 16 bits as they are.
  const bool unit = matrix_unit && suits_matrix_unit(makes, dtype, groups, params, features);
  const bool as_it_lies = makes == Makes::weights || dtype == Dtype::f32 || dtype == Dtype::f64;
  // Where pairs of bf16 halve what it takes to generate a weight, rows weigh more. Against `tile`,
  // of 64-64, 64 features and 1,024 tasks, 1, 2, 4 and 8 rows took 0.83, 0.86, 1.02 and 1.34 of the
  // time, and of 8-32 0.69, 0.76, 0.84 and 1.04; with task_ids, 1.125 and 1.5 rows a task of 64-64
  // 0.94 and 1.21, and of 8-32 0.78 and 0.94 (Zen 5, two threads).
  const bool rows_weigh =
      pairs && dtype == Dtype::bf16 && makes == Makes::weights && params >= 1024;
  const Index most = makes == Makes::weights ? (rows_weigh ? 4 : 8)
                     : !unit                 ? 2
                     : features > 96         ? 16
                                             : 8;
  const bool few = !groups.ragged ? groups.rows <= most
                   : rows_weigh   ? 8 * rows <= 9 * tasks
                                  : 4 * rows <= 5 * tasks;
  return (unit || as_it_lies) && few ? Plan::contract : Plan::tile;
}

bool runs_whole(Makes makes, Dtype dtype, const Groups& groups, Index params, bool matrix_unit,
                bool pairs) {
  // Fewer pieces than it takes to make packing the head worthwhile.
  constexpr Index few = 4;
  // A network larger than this leaves no room for its rows in the second-level cache.
  const Index largest = (256 << 10) / (dtype == Dtype::f64 ? 8 : 4);
  const Index pieces = std::max<Index>(groups.pieces, 1);
  if (params > largest) return false;
  if (pieces <= few) return true;
  // So many rows a piece that the weights, once made, are used often enough to be worth storing: in
  // pairs of bf16 they are made in half the time, and each layer's rows needed widening (256 tasks
  // of 32 rows, 64-64-10: 0.45 ms instead of 0.54). In the backward pass fewer, as gradients of
  // weights are formed once instead of twice: of small networks from where `contract` ends, or,
  // with task_ids, soon after (1,024 of 8 rows, 8-32-1: 0.53 ms instead of 0.64, in bf16 0.52
  // instead of 0.84). A bf16 head whose features lie apart is not multiplied in pairs, and runs as
  // if it were.
  constexpr Index small = 1024;
  const bool wide = dtype == Dtype::f32 || dtype == Dtype::f64;
  const Index many = makes == Makes::weights         ? (pairs && dtype == Dtype::bf16 ? 16 : 48)
                     : params > small || matrix_unit ? 24
                     : wide                          ? 3
                                                     : 1;
  return total_rows(groups) >= many * pieces;
}

bool keeps(Dtype dtype, Index params, Index kept, Index tasks, Index rows, Index features) {
  // With many rows a task, to compute pre-activations again takes less than to write them to new
  // memory (SIREN 2-64-64-1, 4,096 rows a task: 2 ms against 8 ms), unless to generate the weights
  // again takes longer than to apply them. Narrow networks do even then: a float that is kept takes
  // as long as about 16 multiply-adds (256 of 2-32-1, 128 features, 64 rows a task, on one thread:
  // 0.67 ms for both passes against 0.79). Larger networks run layer by layer, and would generate
  // all weights again.
  if (rows < 48 * tasks || params * (dtype == Dtype::f64 ? 8 : 4) > (256 << 10)) return true;
  const bool narrow = params * (rows + features * tasks) < 16 * kept * rows;
  return rows < features * tasks && !narrow;
}

}  // namespace hyperfast
