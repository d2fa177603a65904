// How an op runs best: every threshold that decides between kernels.
#pragma once

#include "kernels.h"

namespace hyperfast {

// Rows of a task that a thread takes at a time: where weights are given, 512 (of 64 columns x takes
// 128 KiB, half the second-level cache), and where they are generated, as they are again for each
// piece.
constexpr Index given_piece = 512, generated_piece = 2048, whole = INT64_MAX;

// Rows of a task between the factors of a matrix of low rank, which stay in the second-level cache.
constexpr Index low_rank_piece = 128;

// Weights of networks that run whole are made for a block of tasks at a time: the head and its
// gradient, which lie in memory, are read for many. With twice as many, their own way to and from
// the caches takes longer.
constexpr Index networks_bytes = 9 << 20;

// Rows of a task whose gradients of given weights, so many, a thread sums at a time, of `rows` in
// all. Sums of the pieces of a task are kept until they are added up: no more than 64 MiB of them,
// or 8 beyond one a task.
inline Index gradient_piece(Index rows, Index params, Index least = given_piece) {
  const Index pieces = (Index{1} << 24) / (params + 1);
  const Index most = pieces < 8 ? 8 : pieces > 256 ? 256 : pieces;
  return rows / most > least ? rows / most : least;
}

// Whether weights are made, or gradients of weights.
enum class Makes { weights, gradients };

// The plan of one layer, by kernels that have a matrix unit, or an instruction for pairs of bf16.
Plan default_plan(Makes makes, Dtype dtype, const Groups& groups, Index params, Index features,
                  bool matrix_unit, bool pairs);

// Whether the matrix unit, where there is one, is faster at `contract` than the vector units.
bool suits_matrix_unit(Makes makes, Dtype dtype, const Groups& groups, Index params,
                       Index features);

// Whether networks run whole, one after another, rather than layer by layer.
bool runs_whole(Makes makes, Dtype dtype, const Groups& groups, Index params, bool matrix_unit,
                bool pairs);

// Whether a forward pass in training should keep its pre-activations.
bool keeps(Dtype dtype, Index params, Index kept, Index tasks, Index rows, Index features);

}  // namespace hyperfast
