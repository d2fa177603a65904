// Memory that is needed soon, fetched a line at each step of the products in between: 64 rows of
// 128 floats come from memory and go there while two layers are multiplied, where waiting for them
// took a quarter of the time.
#pragma once

#include "isa/rows/staged.h"

namespace hyperfast::HF_ISA {

class Ahead {
 public:
  void add(const void* data, Index bytes) {
    if (count < most && bytes > 0)
      parts[count++] = {static_cast<const char*>(data), ceil_div(bytes, 64)};
  }
  // Rows of a piece, if they are one stretch.
  template <class T>
  void add_rows(const Rows& rows, const Groups& g, const Piece& q, Index columns) {
    if (side_by_side(rows, g, columns))
      add(row_data<T>(rows, g, q, q.begin), (q.end - q.begin) * columns * Index(sizeof(T)));
  }

  // So many lines, or a few more than there are; null when all have been taken.
  const char* take(Index lines) {
    while (next < count && parts[next].lines <= 0) ++next;
    if (next == count) return nullptr;
    Part& p = parts[next];
    const char* const from = p.at;
    p.at += lines * 64;
    p.lines -= lines;
    return from;
  }

 private:
  struct Part {
    const char* at;
    Index lines;
  };
  static constexpr int most = 8;
  Part parts[most];
  int count = 0, next = 0;
};

}  // namespace hyperfast::HF_ISA
