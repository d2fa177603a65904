#pragma once

#include <vector>

#include "kernels.h"
#include "plan.h"

namespace hyperfast {

// Rows sorted by task, and the memory that the kernels' view of them points into.
class Grouping {
 public:
  // (tasks, rows, ...) tensors: every task has the same rows.
  static Grouping batched(Index tasks, Index rows, Index cut = given_piece);

  // ids[r * stride] is the task of row r. Throws std::out_of_range unless all are in [0, tasks).
  // Tasks without rows get no piece, unless `all` asks for one (empty) piece a task.
  static Grouping ragged(const Index* ids, Index stride, Index rows, Index tasks,
                         Index cut = given_piece, bool all = false);

  // What it would be of so many rows in all, if ragged ones named as many tasks as they can.
  static Groups assumed(bool ragged, Index tasks, Index rows, Index cut);

  const Groups& view() const { return view_; }

 private:
  struct Named {
    Index task, row;
  };

  static std::vector<Named> checked(const Index* ids, Index stride, Index rows, Index tasks);
  static void sort_by_task(std::vector<Named>& named, Index tasks);
  void sort_rows(std::vector<Named>& named, Index tasks);
  void count_rows(const std::vector<Named>& named, Index tasks, bool all);

  // Pieces of one task, whose rows are order_[first], ..., order_[last - 1].
  void cut_rows(Index task, Index first, Index last);

  Groups view_{};
  std::vector<Index> order_;
  std::vector<Piece> pieces_;
};

}  // namespace hyperfast
