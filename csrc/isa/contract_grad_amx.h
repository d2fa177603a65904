// contract_grad.h on the matrix unit: panels of G are split into parts as they are formed.
#pragma once

#include "contract_amx.h"
#include "contract_grad.h"

#ifdef __AMX_BF16__

namespace hyperfast::HF_ISA {

// The parts of G. A product of two bf16 has 16 bits, hence two parts; a sum of several, formed in float, three.
template <class T, class F>
static bool with_parts_of_gradient(Index rows, const F& body) {
  if constexpr (std::is_same_v<T, bf16>)
    if (rows == 1) return body(std::integral_constant<int, 2>{});
  return body(std::integral_constant<int, 3>{});
}

// Parameters, and units, whose G is split at a time: 12 KiB of it, which stay in the first level beside as much of
// what they are multiplied with.
constexpr Index panel_steps = 2, panel_depth_amx = panel_steps * tile_depth;

// Of a parameter: its output's gradient and its input, of the first unit and its first row; the vector has none.
struct Factors {
  const float *grad, *x;
};

struct FactorsOf {
  UnitLanes grad, x;

  // From one block of units to the next.
  Index grad_block() const { return grad.at(1, 0, 0) - grad.data; }
  Index x_block() const { return x.at(1, 0, 0) - x.data; }

  // Of n parameters from p on, of `params`; the last again for those beyond it, of which nothing is used.
  void find(Index p, Index n, Index params, Factors* to) const {
    const Index matrix = grad.columns * x.columns;
    Index o = p < matrix ? p / x.columns : p - matrix, i = p < matrix ? p % x.columns : 0;
    for (Index j = 0; j < n; ++j, ++p) {
      if (p >= params) {
        to[j] = to[j - 1];
        continue;
      }
      if (p == matrix) o = 0;
      to[j] = {grad.at(0, 0, o), p < matrix ? x.at(0, 0, i) : nullptr};
      if (p >= matrix || ++i == x.columns) i = 0, ++o;
    }
  }

  // G of a parameter, for the 16 units from `lane` on of a block.
  Vec<float> form(const Factors& f, Index block, Index lane) const {
    const float *g = f.grad + block * grad_block() + lane, *factor = f.x ? f.x + block * x_block() + lane : nullptr;
    Vec<float> sum = factor ? load(g) * load(factor) : load(g);
    for (Index r = 1; r < grad.rows; ++r) {
      g += grad.columns * two_tiles;
      if (factor) factor += x.columns * two_tiles;
      sum += factor ? load(g) * load(factor) : load(g);
    }
    return sum;
  }
};

// All rows of all units as lanes, in the slot.
static inline UnitLanes turn_units(const Staged<const float>& rows, const Groups& g, Index columns, Slot slot) {
  const Units units(g);
  const UnitLanes to{scratch<float>(slot, max(UnitLanes::elements(units.count, units.rows, columns), 1)),
                            units.rows, columns};
  parallel(ceil_div(units.count, two_tiles), max(parallel_work / max(16 * two_tiles * units.rows * columns, 1), 1),
           [&](Index begin, Index end) {
             for (Index block = begin; block < end; ++block) turn_block(units, rows, 0, units.count, block, to);
           });
  return to;
}

static inline FactorsOf turn_factors(const Staged<const float>& grad, Index out, const Staged<const float>& x, Index in,
                                     const Groups& g) {
  return {turn_units(grad, g, out, Slot::turned_a), turn_units(x, g, in, Slot::turned_b)};
}

// One row (features) for every unit: parts (units, features), C^T = V^T G. False as in hyper_linear_contract_amx.
template <class T, int of_g>
static bool grad_h_amx(const HyperLinearGradH& p, const FactorsOf& factors, float* parts) {
  constexpr int of_head = parts_of<T>;
  constexpr Index most = panel_depth_amx;
  const Index count = Units(p.groups).count, params = p.out * (p.in + (p.vector.weight != nullptr));
  // Units of a thread share what it splits of the head; their sums stay in the second level.
  const Index fit = max((unit_bytes / 2) / (max(p.features, 1) * Index(sizeof(float))) / two_tiles, 1) * two_tiles;
  const Index blocks = max(ceil_div(count, fit), min(thread_count(), ceil_div(count, two_tiles)));
  const Index size = round_up(ceil_div(count, blocks), two_tiles), row = size + tile_side;
  const T* weight = static_cast<const T*>(p.matrix.weight);  // the vector's rows follow those of the matrix
  const Index feature_tiles = ceil_div(p.features, tile_side);
  const ParameterBlocks order(most, p.out, p.in, params);
  Verdict verdict;
  parallel(ceil_div(count, size), max(parallel_work / max(size * params * p.features / 4, 1), 1),
           [&](Index begin, Index end) {
    const TileRegisters registers;
    float* sums = scratch<float>(Slot::block, feature_tiles * tile_side * row);
    bf16* panel = scratch<bf16>(Slot::local_b, Packed<of_g>::elements(two_tiles, most));
    bf16* head_tiles = scratch<bf16>(Slot::local_a, Packed<of_head>::elements(p.features, most));
    for (Index b = begin; b < end; ++b) {
      const Index first = b * size, n = min(size, count - first);
      for (Index i = 0; i < order.count(); ++i) {
        const Index q = order.first(i), depth = min(most, params - q);
        const Packed<of_head> head(head_tiles, depth);
        Magnitudes head_found;
        for (Index step = 0; step < head.steps; ++step) {
          const Index some = min(depth - step * tile_depth, tile_depth);
          const T* columns[tile_depth];
          for (Index l = 0; l < some; ++l) columns[l] = weight + (q + step * tile_depth + l) * p.matrix.in;
          for (Index k = 0; k < feature_tiles; ++k)
            pack_columns<of_head, tile_depth, T>(columns, some, p.features - k * tile_side, k * tile_side, p.matrix.feature,
                                       head.tile(k, step), head_found);
        }
        const Range range = head_found.range();
        const Packed<of_g> gradient(panel, depth);
        Factors of[most];
        factors.find(q, most, params, of);
        for (Index u = 0; u < n; u += two_tiles) {
          Magnitudes found;
          for (Index s = 0; s < gradient.steps; ++s)
            for (Index j = 0; j < tile_side; ++j) {
              const Factors *low = of + s * tile_depth + j, *high = low + tile_side;
              for (Index v = 0; v < 2; ++v)
                put_line<of_g>(gradient.tile(v, s) + j * tile_depth, factors.form(*low, (first + u) / two_tiles, v * tile_side),
                               factors.form(*high, (first + u) / two_tiles, v * tile_side), found);
            }
          if (!verdict.holds(found.range(), range)) return;
          for (Index k = 0; k < feature_tiles; k += 2) {
            float* to = sums + k * tile_side * row + u;
            const Start start{i ? to : nullptr, row, tile_side * row, tile_side};
            multiply_blocks(head, k, min(feature_tiles - k, 2), gradient, 0, 2, start, to, row);
          }
        }
      }
      pack<float, float>(n, p.features, View<const float>{sums, 1, row}, parts + first * p.features, p.features,
                         p.features);
    }
  });
  return verdict.good;
}

// y (params, features), in float.
template <class T, int of_g>
static bool grad_weight_amx(const HyperLinearGradWeight& p, const FactorsOf& factors, float* y) {
  constexpr int of_h = parts_of<T>;
  const Index count = Units(p.groups).count, params = p.out * (p.in + p.target_bias);
  const Index feature_tiles = ceil_div(p.features, tile_side);
  const Index row = feature_tiles * tile_side + tile_side;  // a line more against cache conflicts
  // Units whose features are split at a time: at most 512 KiB of them, in the second level. Each thread splits
  // them for itself: to fetch what another has split takes longer.
  const Index most = max((512 << 10) / (feature_tiles * of_h * tile_elements * panel_steps * 2), 1) * panel_depth_amx;
  const ParameterBlocks order(two_tiles, p.out, p.in, params);
  Verdict verdict;
  parallel(order.count(), max(parallel_work / max(two_tiles * count * p.features / 4, 1), 1), [&](Index begin, Index end) {
    const TileRegisters registers;
    Units units(p.groups);
    float* sums = scratch<float>(Slot::block, two_tiles * row);
    bf16* panel = scratch<bf16>(Slot::local_a, Packed<of_g>::elements(two_tiles, panel_depth_amx));
    bf16* h_tiles = scratch<bf16>(Slot::local_b, Packed<of_h>::elements(p.features, min(most, count)));
    for (Index u = 0; u < count; u += most) {
      const Index n = min(most, count - u);
      const Packed<of_h> h(h_tiles, n);
      Magnitudes h_found;
      for (Index s = 0; s < h.steps; ++s) {
        const Index first = u + s * tile_depth, some = min(u + n - first, tile_depth);
        const T* rows[tile_depth];
        for (Index l = 0; l < some; ++l) rows[l] = static_cast<const T*>(p.h.data) + units.task(first + l) * p.h.task;
        for (Index k = 0; k < feature_tiles; ++k)
          pack_b_rows<of_h, T>(rows, some, p.features - k * tile_side, k * tile_side, p.h.col, h.tile(k, s), h_found);
      }
      const Range h_range = h_found.range();
      for (Index i = begin; i < end; ++i) {
        const Index q = order.first(i), some = min(two_tiles, params - q), down = ceil_div(some, tile_side);
        Factors of[two_tiles];
        factors.find(q, two_tiles, params, of);
        if (u)
          for (Index j = 0; j < some; ++j)
            for (Index k = 0; k < p.features; ++k) sums[j * row + k] = y[(q + j) * p.features + k];
        for (Index c = 0; c < n; c += panel_depth_amx) {
          const Packed<of_g> gradient(panel, min(panel_depth_amx, n - c));
          Magnitudes found;
          for (Index s = 0; s < gradient.steps; ++s)
            for (Index j = 0; j < down * tile_side; ++j) {
              const Index block = (u + c) / two_tiles + s;
              put_line<of_g>(gradient.tile(j / tile_side, s) + j % tile_side * tile_depth,
                             factors.form(of[j], block, 0), factors.form(of[j], block, tile_side), found);
            }
          if (!verdict.holds(found.range(), h_range)) return;
          for (Index k = 0; k < feature_tiles; k += 2) {
            float* to = sums + k * tile_side;
            const Start start{u + c ? to : nullptr, row, tile_side * row, tile_side};
            multiply_blocks<of_g, of_h>(gradient.steps, panel, down, gradient.steps, h.tile(k, c / tile_depth),
                                        min(feature_tiles - k, 2), h.steps, start, to, row);
          }
        }
        for (Index j = 0; j < some; ++j)
          for (Index k = 0; k < p.features; ++k) y[(q + j) * p.features + k] = sums[j * row + k];
      }
    }
  });
  return verdict.good;
}

template <class T>
static bool grad_h_on_matrix_unit(const HyperLinearGradH& p, const Staged<const float>& grad,
                                  const Staged<const float>& x, float* parts) {
  const Index params = p.out * (p.in + (p.vector.weight != nullptr));
  if (!suits_matrix_unit(Makes::gradients, p.dtype, p.groups, params, p.features)) return false;
  const FactorsOf factors = turn_factors(grad, p.out, x, p.in, p.groups);
  return with_parts_of_gradient<T>(factors.x.rows, [&](auto of_g) { return grad_h_amx<T, of_g>(p, factors, parts); });
}

template <class T>
static bool grad_weight_on_matrix_unit(const HyperLinearGradWeight& p, const Staged<const float>& grad,
                                       const Staged<const float>& x, float* y) {
  const Index params = p.out * (p.in + p.target_bias);
  if (!suits_matrix_unit(Makes::gradients, p.dtype, p.groups, params, p.features)) return false;
  const FactorsOf factors = turn_factors(grad, p.out, x, p.in, p.groups);
  return with_parts_of_gradient<T>(factors.x.rows, [&](auto of_g) { return grad_weight_amx<T, of_g>(p, factors, y); });
}

}  // namespace hyperfast::HF_ISA

#endif
