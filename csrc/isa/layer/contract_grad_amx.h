// contract_grad.h on the matrix unit. G is formed a square of 32 parameters and 32 units at a time,
// and split into parts that serve both gradients: its columns are multiplied by the head, its rows
// by the features. Each adds up in the cache.
#pragma once

#include "isa/layer/contract_amx.h"
#include "isa/layer/contract_grad.h"

#ifdef HF_MATRIX_UNIT

namespace hyperfast::HF_ISA {

// The same, and with the number of parts of G. A product of two bf16 has 16 bits, hence two parts;
// a sum of several, formed in float, three.
template <class T, class F>
static bool with_parts_of_gradient(Index rows, const F& body) {
  return with_parts<T>([&](auto of) {
    if constexpr (std::is_same_v<T, bf16>)
      return rows == 1 ? body(of, Count<2>{}) : body(of, Count<3>{});
    else
      return body(of, of);
  });
}

// Of squares of 32 x 32 floats one lies behind another.
constexpr Index square = two_tiles * two_tiles;

// So many of them, of successive parameters, are multiplied by the head at a time: sums are loaded
// and stored half as often.
constexpr Index deep = 2;

// Where G is a sum over rows, so many squares of it are formed at a time.
constexpr Index formed_squares = 4;

// Of a parameter: its output's gradient and its input, of the first unit and its first row; the
// vector has none.
struct Factors {
  const float *grad, *x;
};

struct FactorsOf {
  UnitLanes grad, x;

  // From one block of units to the next.
  Index grad_block() const { return grad.at(1, 0, 0) - grad.data; }
  Index x_block() const { return x.at(1, 0, 0) - x.data; }

  // Of 32 parameters from p on, of `params`; the last again for those beyond it, of which nothing
  // is used.
  void find(Index p, Index params, Factors* to) const {
    const Index matrix = grad.columns * x.columns;
    Index o = p < matrix ? p / x.columns : p - matrix, i = p < matrix ? p % x.columns : 0;
    for (Index j = 0; j < two_tiles; ++j, ++p) {
      if (p >= params) {
        to[j] = to[j - 1];
        continue;
      }
      if (p == matrix) o = 0;
      to[j] = {grad.at(0, 0, o), p < matrix ? x.at(0, 0, i) : nullptr};
      if (p >= matrix || ++i == x.columns) i = 0, ++o;
    }
  }

  // G of n squares of parameters for the 32 units of a block. Outputs of the same inputs are formed
  // together, as the inputs of many rows come from the second level.
  void form(const Factors* of_params, Index n, Index block, float* to) const {
    for (Index s = 0, alike; s < n; s += alike) {
      const Factors* f = of_params + s * two_tiles;
      for (alike = 1;
           s + alike < n && follow(f, f, two_tiles) && follow(f, f + alike * two_tiles, two_tiles);)
        ++alike;
      for (Index j = 0, run; j < two_tiles; j += run) {
        run = j + 4 <= two_tiles && follow(f + j, f + j, 4) ? 4 : 1;
        for (Index i = 0; i < alike; i += 2) {
          const Factors* first = f + i * two_tiles + j;
          float* sums = to + (s + i) * square + j * two_tiles;
          if (run == 1)
            form_run<1, 1>(first, block, sums);
          else if (i + 1 < alike)
            form_run<2, 4>(first, block, sums);
          else
            form_run<1, 4>(first, block, sums);
        }
      }
    }
  }

 private:
  // Whether g are n parameters of one output, and of inputs that follow one another as, or from,
  // those of f.
  static bool follow(const Factors* f, const Factors* g, Index n) {
    bool all = f->x && g->x == f->x;
    for (Index j = 1; all && j < n; ++j)
      all = g[j].x == f->x + j * two_tiles && g[j].grad == g->grad;
    return all;
  }

  // Of N parameters of Outputs squares, which have the same inputs.
  template <Index Outputs, Index N>
  void form_run(const Factors* f, Index block, float* to) const {
    const float *g[Outputs], *factor = f->x ? f->x + block * x_block() : nullptr;
    for (Index o = 0; o < Outputs; ++o) g[o] = f[o * two_tiles].grad + block * grad_block();
    Vec<float> sum[Outputs][N][2] = {};
    for (Index r = 0; r < grad.rows; ++r) {
      Vec<float> first[Outputs], second[Outputs];
#pragma GCC unroll 2
      for (Index o = 0; o < Outputs; ++o) {
        first[o] = load(g[o]), second[o] = load(g[o] + tile_side);
        g[o] += grad.columns * two_tiles;
      }
      if (!factor) {
        sum[0][0][0] += first[0], sum[0][0][1] += second[0];
        continue;
      }
#pragma GCC unroll 4
      for (Index i = 0; i < N; ++i) {
        const Vec<float> x0 = load(factor + i * two_tiles),
                         x1 = load(factor + i * two_tiles + tile_side);
#pragma GCC unroll 2
        for (Index o = 0; o < Outputs; ++o)
          sum[o][i][0] += first[o] * x0, sum[o][i][1] += second[o] * x1;
      }
      factor += x.columns * two_tiles;
    }
#pragma GCC unroll 2
    for (Index o = 0; o < Outputs; ++o)
#pragma GCC unroll 4
      for (Index i = 0; i < N; ++i) {
        float* sums = to + o * square + i * two_tiles;
        store(sums, sum[o][i][0]), store(sums + tile_side, sum[o][i][1]);
      }
  }
};

// All rows of all units as lanes, in the slot.
static inline UnitLanes transpose_units(const Staged<const float>& rows, const Groups& g,
                                        Index columns, Slot slot) {
  const Units units(g);
  const UnitLanes to{
      scratch<float>(slot, max(UnitLanes::elements(units.count, units.rows, columns), 1)),
      units.rows, columns};
  parallel(ceil_div(units.count, two_tiles),
           max(parallel_work / max(16 * two_tiles * units.rows * columns, 1), 1),
           [&](Index begin, Index end) {
             for (Index block = begin; block < end; ++block)
               transpose_block(units, rows, 0, units.count, block, to);
           });
  return to;
}

// What threads share: a cut of the longer side, whatever their number is, so that the result does
// not depend on it. Sides are blocks of 32 units, and of 32 parameters. Of the gradient whose sum
// runs along this side a share has but a part: all of them take 8 MiB, or 8 times the gradient's
// size.
struct Shares {
  bool by_units;
  Index side, size, count;

  Shares(Index features, Index unit_blocks, Index param_blocks)
      : by_units(unit_blocks > param_blocks), side(max(unit_blocks, param_blocks)) {
    const Index part = min(unit_blocks, param_blocks) * two_tiles * features * Index(sizeof(float));
    // What both gradients need of the other side is prepared anew for each share: few where there
    // is little to do.
    const Index wanted = max(min(side / 16, max(min((8 << 20) / part, 16), 8)), min(side / 4, 8));
    size = ceil_div(side, max(wanted, 1));
    count = ceil_div(side, size);
  }
  Index parts_of_features() const { return by_units ? 1 : count; }
  Index parts_of_weight() const { return by_units ? count : 1; }
};

// Where a share puts what it has of each gradient: (units, features), (params, features), (params),
// or null.
struct ShareSums {
  float *features, *weight, *bias;
};

template <class T, int of, int of_g>
struct GradientShare {
  const HyperLinearGrad& p;
  const FactorsOf& factors;
  Index feature_tiles = ceil_div(p.features, tile_side), across = ceil_div(p.features, two_tiles);
  // Blocks at a time: of units, whose split features, and of parameters, whose part of the head and
  // sums, take half a MiB.
  Index most_units = max((1 << 20) / (feature_tiles * of * tile_line * two_tiles), 1);
  Index most_params =
      max((512 << 10) / (feature_tiles * of * tile_line * tile_side + across * square * 4) / deep,
          1) *
      deep;
  ParameterBlocks order{two_tiles, p.out, p.in, p.params()};

  GradientShare(const HyperLinearGrad& p, const FactorsOf& factors) : p(p), factors(factors) {}

  // So many parameters are there of a block.
  Index some_params(Index block) const { return min(two_tiles, p.params() - order.first(block)); }

  // What there is in the cache of some blocks of parameters and of units.
  struct Stretch {
    Packed<of_g> a{nullptr, tile_depth},
        b{nullptr, deep * tile_depth};  // the parts of a square, and of `deep` of them
    float* formed;                      // squares of G
    Packed<of> h{nullptr, tile_depth}, head{nullptr, deep * tile_depth};
    float *sums_h, *sums_w;  // squares, those of the same block one behind another
    float* bias;             // a vector for each parameter
    Factors* factors;        // of each parameter
  };

  // All features of some blocks of units or parameters; as many blocks as there are steps lie next
  // to each other.
  bf16* reserve(Slot slot, const Packed<of>& packed, Index blocks) const {
    return scratch<bf16>(slot, round_up(blocks, packed.steps) * feature_tiles * of * tile_elements);
  }
  bf16* tile_of(const Packed<of>& packed, Index block, Index k) const {
    return packed.tile(block / packed.steps * feature_tiles + k, block % packed.steps);
  }

  Range pack_features(Index first, Index blocks, const Packed<of>& to) const {
    Units units(p.groups);
    Magnitudes found;
    for (Index s = 0; s < blocks; ++s) {
      const Index unit = (first + s) * two_tiles, some = min(units.count - unit, two_tiles);
      const T* rows[two_tiles];
      for (Index l = 0; l < some; ++l)
        rows[l] = static_cast<const T*>(p.h.data) + units.task(unit + l) * p.h.task;
      for (Index k = 0; k < feature_tiles; ++k)
        pack_b_rows<of, T>(rows, some, p.features - k * tile_side, k * tile_side, p.h.col,
                           tile_of(to, s, k), found);
    }
    return found.range();
  }

  Range pack_head(Index first, Index blocks, const Packed<of>& to) const {
    Magnitudes found;
    for (Index s = 0; s < blocks; ++s) {
      const Index some = some_params(first + s);
      const T* columns[two_tiles];
      for (Index l = 0; l < some; ++l)  // the vector's rows follow those of the matrix
        columns[l] = static_cast<const T*>(p.matrix.weight) +
                     (order.first(first + s) + l) * p.matrix.in_stride;
      for (Index k = 0; k < feature_tiles; ++k)
        pack_columns<of, two_tiles, T>(columns, some, p.features - k * tile_side, k * tile_side,
                                       p.matrix.feature, tile_of(to, s, k), found);
    }
    return found.range();
  }

  // Square s of G, for the units of a block, as tiles of A (parameters, units) and of B
  // (parameters, units). If `bias` is wanted, the sums over the units are added to it.
  Range split_square(const Stretch& t, Index s, Index block, bool bias) const {
    const bool single = factors.grad.rows == 1;  // then G is but a product
    const Index grad_at = block * factors.grad_block(), x_at = block * factors.x_block();
    const Factors* of_params = t.factors + s * two_tiles;
    const float* formed = t.formed + s % formed_squares * square;
    float* sums = t.bias + s * two_tiles * tile_side;
    bf16* const a[2] = {t.a.tile(s % deep * 2, 0), t.a.tile(s % deep * 2 + 1, 0)};
    bf16* const b[2] = {t.b.tile(0, s % deep), t.b.tile(1, s % deep)};
    Magnitudes found;
    for (Index j = 0; j < tile_side; ++j) {
      Vec<float> g[2][2];  // of parameters j and j + 16
#pragma GCC unroll 2
      for (Index i = 0; i < 2; ++i) {
        const Factors& f = of_params[i * tile_side + j];
        const float* from = single ? f.grad + grad_at : formed + (i * tile_side + j) * two_tiles;
        g[i][0] = load(from), g[i][1] = load(from + tile_side);
        if (single && f.x) g[i][0] *= load(f.x + x_at), g[i][1] *= load(f.x + x_at + tile_side);
      }
      if (bias)
#pragma GCC unroll 2
        for (Index i = 0; i < 2; ++i) {
          float* sum = sums + (i * tile_side + j) * tile_side;
          store(sum, load(sum) + (g[i][0] + g[i][1]));
        }
      const Bits any = (Bits(g[0][0]) | Bits(g[0][1])) | (Bits(g[1][0]) | Bits(g[1][1]));
#pragma GCC unroll 3
      for (int part = 0; part < of_g; ++part) {
        Bits bits[2][2];
#pragma GCC unroll 2
        for (Index i = 0; i < 2; ++i)
#pragma GCC unroll 2
          for (Index v = 0; v < 2; ++v)
            bits[i][v] = take_part<exact_parts<T, of_g>>(g[i][v], part + 1 == of_g);
        const Index at = part * tile_elements + j * tile_depth;
#pragma GCC unroll 2
        for (Index i = 0; i < 2; ++i) {
          const __m512i units = in_turns(bits[i][0], bits[i][1]);
          if (part == 0) found.include(units, any);
          _mm512_store_si512(a[i] + at, units);
          _mm512_store_si512(b[i] + at, in_turns(bits[0][i], bits[1][i]));
        }
      }
    }
    return found.range();
  }

  static Start start(bool begun, const float* sum) {
    return {begun ? sum : nullptr, two_tiles, tile_side * two_tiles, tile_side};
  }

  // Adds the products of n squares, parameters from s on and units `block`, to the sums of the
  // features' gradient.
  void multiply_by_head(const Stretch& t, Index s, Index n, Index block, bool begun) const {
    for (Index k = 0; k < feature_tiles; k += 2) {
      float* sum = t.sums_h + (block * across + k / 2) * square;
      multiply_blocks<of, of_g>(n, tile_of(t.head, s, k), min(feature_tiles - k, 2), deep, t.b.data,
                                2, deep, start(begun, sum), sum, two_tiles);
    }
  }

  // The same of one of them to the sums of the weight's gradient.
  void multiply_by_features(const Stretch& t, Index s, Index block, Index params,
                            bool begun) const {
    for (Index k = 0; k < feature_tiles; k += 2) {
      float* sum = t.sums_w + (s * across + k / 2) * square;
      multiply_blocks<of_g, of>(1, t.a.tile(s % deep * 2, 0), ceil_div(params, tile_side), 1,
                                tile_of(t.h, block, k), min(feature_tiles - k, 2), 1,
                                start(begun, sum), sum, two_tiles);
    }
  }

  // Blocks [q0, q1) of parameters, [u0, u1) of units. False if some number was not for the matrix
  // unit.
  bool run(Index q0, Index q1, Index u0, Index u1, const ShareSums& to, Verdict& verdict) const {
    const Index parts = Packed<of_g>::elements(two_tiles, deep * tile_depth);
    Stretch t;
    t.a.data = scratch<bf16>(Slot::block, 2 * parts + 2 * square * formed_squares);
    t.b.data = t.a.data + parts;
    t.formed = reinterpret_cast<float*>(t.b.data + parts);
    for (Index u = u0; u < u1; u += most_units) {
      const Index blocks = min(most_units, u1 - u);
      t.h.data = reserve(Slot::local_b, t.h, blocks);
      const Range h_range = to.weight ? pack_features(u, blocks, t.h) : Range{};
      t.sums_h = scratch<float>(Slot::local_d, blocks * across * square);
      for (Index q = q0; q < q1; q += most_params) {
        const Index steps = min(most_params, q1 - q);
        t.head.data = reserve(Slot::local_a, t.head, steps);
        const Range head_range = to.features ? pack_head(q, steps, t.head) : Range{};
        t.sums_w = scratch<float>(Slot::local_c, steps * (across * square + two_tiles * tile_side) +
                                                     steps * two_tiles * 4);
        t.bias = t.sums_w + steps * across * square;
        t.factors = reinterpret_cast<Factors*>(t.bias + steps * two_tiles * tile_side);
        for (Index s = 0; s < steps; ++s)
          factors.find(order.first(q + s), p.params(), t.factors + s * two_tiles);
        for (Index j = 0; j < steps * two_tiles * tile_side; ++j) t.bias[j] = 0;
        for (Index block = 0; block < blocks; ++block)
          for (Index s = 0; s < steps; ++s) {
            if (factors.grad.rows != 1 && s % formed_squares == 0)
              factors.form(t.factors + s * two_tiles, min(formed_squares, steps - s), u + block,
                           t.formed);
            const Range range = split_square(t, s, u + block, to.bias);
            if (!verdict.holds(range, h_range) || !verdict.holds(range, head_range)) return false;
            if (to.features && (s % deep == deep - 1 || s + 1 == steps))
              multiply_by_head(t, s - s % deep, s % deep + 1, block, q > q0 || s >= deep);
            if (to.weight) multiply_by_features(t, s, block, some_params(q + s), block > 0);
          }
        for (Index s = 0; s < steps; ++s)
          add_sums(q + s, t.sums_w + s * across * square, t.bias + s * two_tiles * tile_side,
                   u > u0, to);
      }
      for (Index block = 0; to.features && block < blocks; ++block)
        for (Index k = 0; k < across; ++k) {
          const Index first = (u + block) * two_tiles,
                      some = min(p.features - k * two_tiles, two_tiles);
          pack<float, float>(
              min(Units(p.groups).count - first, two_tiles), some,
              View<const float>{t.sums_h + (block * across + k) * square, 1, two_tiles},
              to.features + first * p.features + k * two_tiles, p.features, some);
        }
    }
    return true;
  }

  // The sums of one block of parameters go where they belong.
  void add_sums(Index block, const float* sums, const float* bias, bool add,
                const ShareSums& to) const {
    const Index first = order.first(block), some = some_params(block);
    for (Index j = 0; to.weight && j < some; ++j)
      for (Index k = 0; k < p.features; k += two_tiles) {
        float* sum = to.weight + (first + j) * p.features + k;
        const float* from = sums + k * two_tiles + j * two_tiles;
        for (Index l = 0; l < min(p.features - k, two_tiles); ++l)
          sum[l] = add ? sum[l] + from[l] : from[l];
      }
    for (Index j = 0; to.bias && j < some; ++j) {
      float sum = add ? to.bias[first + j] : 0;
      for (Index l = 0; l < tile_side; ++l) sum += bias[j * tile_side + l];
      to.bias[first + j] = sum;
    }
  }
};

// The gradients that are wanted, that of h (tasks, features) in float; false if some number was not
// for the unit.
template <class T>
static bool grad_on_matrix_unit(const HyperLinearGrad& p, const Staged<const float>& grad,
                                const Staged<const float>& x, float* grad_h, bool add) {
  const Index params = p.params(), count = Units(p.groups).count;
  if (!suits_matrix_unit(Makes::gradients, p.dtype, p.groups, params, p.features)) return false;
  const FactorsOf factors{transpose_units(grad, p.groups, p.out, Slot::transposed_a),
                          transpose_units(x, p.groups, p.in, Slot::transposed_b)};
  const Index unit_blocks = ceil_div(count, two_tiles), param_blocks = ceil_div(params, two_tiles);
  const Shares shares(p.features, unit_blocks, param_blocks);
  const Index of_h = shares.parts_of_features(), of_w = shares.parts_of_weight();
  const Index size_h = grad_h ? count * p.features : 0,
              size_w = p.grad_weight ? params * p.features : 0, size_b = p.grad_bias ? params : 0;
  // What is but one part goes where it belongs.
  const bool direct_h = of_h == 1 && !add && !p.groups.ragged,
             direct_w = of_w == 1 && std::is_same_v<T, float>;
  float* parts = scratch<float>(
      Slot::sums,
      max((direct_h ? 0 : of_h * size_h) + (direct_w ? 0 : of_w * (size_w + size_b)), 1));
  float* const parts_h = direct_h ? grad_h : parts;
  if (!direct_h) parts += of_h * size_h;
  float* const parts_w = direct_w ? static_cast<float*>(p.grad_weight) : parts;
  float* const parts_b = direct_w ? static_cast<float*>(p.grad_bias) : parts + of_w * size_w;
  Verdict verdict;
  const Index rows = p.groups.ragged ? 1 : p.groups.rows;
  const bool good = with_parts_of_gradient<T>(rows, [&](auto of, auto of_g) {
    const GradientShare<T, of, of_g> share(p, factors);
    const Index work = shares.size * (unit_blocks + param_blocks - shares.side) * two_tiles *
                       two_tiles * p.features / 4;
    each_thread(shares.count, max(parallel_work / max(work, 1), 1), [&](Work& some) {
      const TileRegisters registers;
      for (Index begin, end; some.take(begin, end);)
        for (Index i = begin; i < end; ++i) {
          const Index first = i * shares.size, last = min(first + shares.size, shares.side);
          const Index h = shares.by_units ? 0 : i, w = shares.by_units ? i : 0;
          const ShareSums to{grad_h ? parts_h + h * size_h : nullptr,
                             p.grad_weight ? parts_w + w * size_w : nullptr,
                             p.grad_bias ? parts_b + w * size_b : nullptr};
          if (shares.by_units ? !share.run(0, param_blocks, first, last, to, verdict)
                              : !share.run(first, last, 0, unit_blocks, to, verdict))
            return;
        }
    });
    return verdict.good;
  });
  if (!good) return false;
  if (grad_h && !direct_h) sum_units<float>(p, false, of_h, parts_h, grad_h, add);
  if (!direct_w) {
    add_up<T>(of_w, size_w, parts_w, static_cast<T*>(p.grad_weight));
    add_up<T>(of_w, size_b, parts_b, static_cast<T*>(p.grad_bias));
  }
  return true;
}

}  // namespace hyperfast::HF_ISA

#endif
