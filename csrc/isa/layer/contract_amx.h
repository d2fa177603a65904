// contract.h on the matrix unit: the weights of 32 parameters and 32 tasks at a time come out of it
// as lanes of tasks, and are multiplied by the inputs of the tasks' rows as they come. The head is
// read as it lies, and split into parts for as many tasks as the cache holds.
#pragma once

#include "isa/layer/contract.h"
#include "isa/unit/amx.h"
#include "plan.h"

#ifdef HF_MATRIX_UNIT

namespace hyperfast::HF_ISA {

// Rows of units as lanes, 32 units side by side: what is at(...) belongs to units [32 block, 32
// block + 32), and the next column is 32 elements on. The blocks lie apart, as a page holds more of
// one than of several.
struct UnitLanes {
  float* data;
  Index rows, columns;

  float* at(Index block, Index row, Index column) const {
    return data + ((block * rows + row) * columns + column) * two_tiles;
  }
  static Index elements(Index units, Index rows, Index columns) {
    return ceil_div(units, two_tiles) * rows * columns * two_tiles;
  }
};

// Columns of one block, zeros for lanes beyond the last of `n` units from `first` on.
static inline void transpose_block(const Units& units, const Staged<const float>& from, Index first,
                                   Index n, Index block, const UnitLanes& to) {
  for (Index r = 0; r < to.rows; ++r)
    for (Index half = 0; half < two_tiles; half += tile_side) {
      const Index unit = block * two_tiles + half, some = max(min(n - unit, tile_side), 0);
      const float* rows[tile_side];
      for (Index l = 0; l < some; ++l) rows[l] = units.row(from, first + unit + l, r);
      pack_lanes<float, float>(rows, some, to.columns, from.col, to.at(block, r, 0) + half,
                               two_tiles, tile_side);
    }
}

// Parameters of outputs [o0, o0 + outputs), in the order of the head: the matrix, then the vector.
struct Parameters {
  Index o0, outputs, in;
  bool vector;

  Index count() const { return outputs * (in + vector); }
};

// Parameters in blocks of `size`: those of the same inputs follow one another, which then stay in
// the second level.
struct ParameterBlocks {
  Index size, out, in, params, across;

  ParameterBlocks(Index size, Index out, Index in, Index params)
      : size(size),
        out(out),
        in(in),
        params(params),
        across(in > 0 && in % size == 0 ? in / size : 0) {}
  Index count() const { return ceil_div(params, size); }
  Index first(Index block) const {
    return block < out * across ? block % out * in + block / out * size : block * size;
  }
};

// Weights (n, 32) that have been made of parameters from q on.
struct Made {
  const float* weights;
  Index q, n;
};

// y += weights (N, 32) times as many inputs x, for all rows of a block of 32 units; the weights
// stay in registers.
template <Index N>
static inline void use_run(const float* weights, const float* x, Index x_row, float* y, Index y_row,
                           Index rows) {
  constexpr int w = width<float>;
  static_assert(w == tile_side);
  Vec<float> held[N][2];
#pragma GCC unroll 8
  for (Index j = 0; j < N; ++j)
    held[j][0] = load(weights + j * two_tiles), held[j][1] = load(weights + j * two_tiles + w);
  for (Index r = 0; r < rows; ++r, x += x_row, y += y_row) {
    Vec<float> first = load(y), second = load(y + w);
    if (x_row == 0) {  // the vector's input is 1
      first += held[0][0], second += held[0][1];
    } else {
#pragma GCC unroll 8
      for (Index j = 0; j < N; ++j) {
        first += held[j][0] * load(x + j * two_tiles);
        second += held[j][1] * load(x + j * two_tiles + w);
      }
    }
    store(y, first);
    store(y + w, second);
  }
}

// y += weights times x for a block of 32 units.
static inline void use_weights(const Parameters& p, const Made& made, const UnitLanes& x,
                               const UnitLanes& y, Index block) {
  const Index matrix = p.outputs * p.in, y_row = y.columns * two_tiles;
  const float* weights = made.weights;
  for (Index q = made.q, n = made.n; n > 0;) {
    const bool vector = q >= matrix;
    const Index o = vector ? q - matrix : q / p.in, i = vector ? 0 : q % p.in;
    Index run = vector ? 1 : min(p.in - i, n);
    q += run;
    n -= run;
    const float* inputs = x.at(block, 0, i);
    float* to = y.at(block, 0, o);
    const auto use = [&](auto f, Index some) {
      for (; run >= some; run -= some, weights += some * two_tiles, inputs += some * two_tiles)
        f(weights, inputs, vector ? 0 : x.columns * two_tiles, to, y_row, x.rows);
    };
    use(use_run<8>, 8);
    use(use_run<4>, 4);
    use(use_run<1>, 1);
  }
}

// Where the head's rows of up to 32 parameters from q on start, and how many they are.
template <class T>
static Index rows_of(const HyperLinear& p, const Parameters& all, Index q,
                     const T* (&rows)[two_tiles]) {
  const Index matrix = all.outputs * all.in, n = min(all.count() - q, two_tiles);
  for (Index j = 0; j < n; ++j, ++q) {
    const bool vector = q >= matrix;
    const Index o = all.o0 + (vector ? q - matrix : q / all.in), i = vector ? 0 : q % all.in;
    const HeadMatrix& m = vector ? p.vector : p.matrix;
    rows[j] = static_cast<const T*>(m.weight) + o * m.out_stride + i * m.in_stride;
  }
  return n;
}

// What the biases of the head make of the inputs, one matrix for all tasks: y = V0 x + v0.
template <class T>
static void use_biases(const HyperLinear& p, const Parameters& all, Index blocks,
                       const UnitLanes& x, const UnitLanes& y) {
  const HeadMatrix &m = p.matrix, &v = p.vector;
  float* vector = scratch<float>(Slot::local_c, max(all.outputs * (all.in + 1), 1));
  float* matrix = vector + all.outputs;
  for (Index o = 0; o < all.outputs; ++o) {
    vector[o] = v.bias ? widen(static_cast<const T*>(v.bias)[(all.o0 + o) * v.bias_out_stride]) : 0;
    for (Index i = 0; m.bias && i < all.in; ++i)
      matrix[o * all.in + i] = widen(
          static_cast<const T*>(m.bias)[(all.o0 + o) * m.bias_out_stride + i * m.bias_in_stride]);
  }
  for (Index j = 0; j < blocks * y.rows; ++j) {
    const View<float> to{y.at(0, j, 0), two_tiles, 1};
    for (Index o = 0; o < all.outputs; ++o)
      for (Index l = 0; l < two_tiles; ++l) to.data[o * two_tiles + l] = vector[o];
    if (m.bias)
      multiply<float, float>(all.outputs, two_tiles, all.in, {matrix, all.in, 1},
                             View<const float>{x.at(0, j, 0), two_tiles, 1},
                             {to.data, two_tiles, 1}, to);
  }
}

// False if some number was not for the matrix unit: then y has to be computed otherwise.
template <class T, int parts>
static bool hyper_linear_contract_amx(const HyperLinear& p, const Staged<const float>& x,
                                      const Staged<float>& y) {
  const Units all(p.groups);
  const Index steps = ceil_div(p.features, tile_depth), threads = thread_count();
  // Of the inputs of a unit those of one block of parameters count, as the blocks that use them
  // follow one another.
  const Index inputs = p.in % two_tiles ? p.in : two_tiles;
  const Index each = steps * parts * tile_line + all.rows * (inputs + 8) * Index(sizeof(float));
  const Index rows_each = max(all.rows * (p.in + p.out) * Index(sizeof(float)),
                              1);  // at most 8 MiB, in the third level
  const Index most = max(min(unit_bytes / each, (8 << 20) / rows_each) / two_tiles, 1) * two_tiles;
  // Threads share what there is more of, units or parameters, as each prepares both of its own.
  const bool by_units = all.count > p.out * p.in || p.out < 8 * threads;
  const Index chunks = max(ceil_div(all.count, most),
                           by_units ? min(2 * threads, ceil_div(all.count, 8 * two_tiles)) : 1);
  const Index size = round_up(ceil_div(all.count, chunks), two_tiles);
  const Index wanted = by_units ? 1 : max(min(ceil_div(2 * threads, chunks), p.out / 8), 1);
  const Index outputs = ceil_div(p.out, wanted), slices = ceil_div(p.out, outputs);
  const Index work = size * outputs * p.in * (p.features / 4 + all.rows);
  Verdict verdict;
  each_thread(
      ceil_div(all.count, size) * slices, max(parallel_work / max(work, 1), 1), [&](Work& items) {
        const TileRegisters registers;
        const Index x_size = UnitLanes::elements(size, all.rows, p.in);
        const Index y_size = UnitLanes::elements(size, all.rows, outputs);
        float* weights = scratch<float>(Slot::block, 2 * two_tiles * two_tiles + x_size + y_size);
        const UnitLanes xs{weights + 2 * two_tiles * two_tiles, all.rows, p.in};
        const Packed<parts> h(
            scratch<bf16>(Slot::local_a, Packed<parts>::elements(size, p.features)), p.features);
        const Packed<parts> head(
            scratch<bf16>(Slot::local_b, Packed<parts>::elements(two_tiles, p.features)),
            p.features);
        Index held = -1;  // the chunk of units whose features and inputs are there
        Range h_range;
        for (Index begin, end; items.take(begin, end);)
          for (Index item = begin; item < end; ++item) {
            const Index chunk = item / slices, first = chunk * size,
                        n = min(size, all.count - first);
            const Index blocks = ceil_div(n, two_tiles), halves = ceil_div(n, tile_side);
            if (chunk != held) {
              held = chunk;
              Units units(p.groups);  // chunks may come in any order
              Magnitudes found;
              for (Index u = 0; u < n; u += tile_side) {
                const Index some = min(n - u, tile_side);
                const T* features[tile_side];
                for (Index l = 0; l < some; ++l)
                  features[l] =
                      static_cast<const T*>(p.h.data) + units.task(first + u + l) * p.h.task;
                for (Index step = 0; step < steps; ++step)
                  pack_columns<parts, tile_side, T>(features, some, p.features - step * tile_depth,
                                                    step * tile_depth, p.h.col,
                                                    h.tile(u / tile_side, step), found);
              }
              h_range = found.range();
              for (Index block = 0; block < blocks; ++block)
                transpose_block(units, x, first, n, block, xs);
            }
            const Index o0 = item % slices * outputs;
            const Parameters params{o0, min(outputs, p.out - o0), p.in, p.vector.weight != nullptr};
            const UnitLanes ys{xs.data + x_size, all.rows, params.outputs};
            use_biases<T>(p, params, blocks, xs, ys);
            const T *rows[two_tiles], *ahead[two_tiles];
            const ParameterBlocks order(two_tiles, params.outputs, p.in, params.count());
            Index next = rows_of<T>(p, params, 0, ahead);
            for (Index i = 0; i < order.count(); ++i) {
              const Index q = order.first(i), some = next;
              std::memcpy(rows, ahead, sizeof rows);
              next = i + 1 < order.count() ? rows_of<T>(p, params, order.first(i + 1), ahead) : 0;
              Magnitudes found;
              for (Index j = 0; j < some; j += tile_side)
                for (Index step = 0; step < steps; ++step)
                  pack_a_rows<parts, T>(rows + j, min(some - j, tile_side),
                                        p.features - step * tile_depth, step * tile_depth,
                                        p.matrix.feature, head.tile(j / tile_side, step), found);
              if (!verdict.holds(found.range(), h_range)) return;
              for (Index block = 0, fetched = 0; block < blocks; ++block) {
                // Meanwhile the rows that come next are fetched, a few at a time.
                for (; fetched * blocks < next * (block + 1) && fetched < next; ++fetched)
                  for (Index k = 0; k < p.features; k += tile_line / Index(sizeof(T)))
                    prefetch(ahead[fetched] + k);
                // In turns: the vector units use the weights of one block while the next are made.
                float* made = weights + block % 2 * two_tiles * two_tiles;
                multiply_blocks(head, 0, ceil_div(some, tile_side), h, 2 * block,
                                min(halves - 2 * block, 2), {}, made, two_tiles);
                use_weights(params, {made, q, some}, xs, ys, block);
              }
            }
            for (Index block = 0; block < blocks; ++block)
              for (Index r = 0; r < all.rows; ++r)
                pack<float, float>(
                    min(n - block * two_tiles, two_tiles), params.outputs,
                    View<const float>{ys.at(block, r, 0), 1, two_tiles},
                    y.data + ((first + block * two_tiles) * all.rows + r) * p.out + o0,
                    all.rows * p.out, params.outputs);
          }
      });
  return verdict.good;
}

template <class T>
static bool hyper_linear_on_matrix_unit(const HyperLinear& p, const Staged<const float>& x,
                                        const Staged<float>& y) {
  const Index params = p.out * (p.in + (p.vector.weight != nullptr));
  return p.transform == Transform::none &&
         suits_matrix_unit(Makes::weights, p.dtype, p.groups, params, p.features) &&
         with_parts<T>([&](auto parts) { return hyper_linear_contract_amx<T, parts>(p, x, y); });
}

}  // namespace hyperfast::HF_ISA

#endif
