#pragma once

#include <vector>

#include "kernels.h"

namespace hyperfast {

// Most rows that one piece holds: of 512 rows and 64 columns, x takes 128 KiB, half the second-level cache.
constexpr Index max_piece = 512;
constexpr Index whole = INT64_MAX;

// Rows sorted by task, and the memory that the kernels' view of them points into.
class Grouping {
 public:
  // (tasks, rows, ...) tensors: every task has the same rows.
  static Grouping batched(Index tasks, Index rows, Index cut = max_piece);

  // ids[r * stride] is the task of row r. Throws std::out_of_range unless all are in [0, tasks).
  // Tasks without rows get no piece, unless `all` asks for one (empty) piece a task.
  static Grouping ragged(const Index* ids, Index stride, Index rows, Index tasks,
                         Index cut = max_piece, bool all = false);

  const Groups& view() const { return view_; }

 private:
  Groups view_{};
  std::vector<Index> order_;
  std::vector<Piece> pieces_;
};

}  // namespace hyperfast
