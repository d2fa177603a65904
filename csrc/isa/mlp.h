// Whole networks. Where few rows share a task, layer by layer for all tasks; where many do, the weights of
// a block of tasks at a time, and then all layers of a network for a few hundred of its rows at a time,
// whose hidden layers stay in the second-level cache.
#pragma once

#include "activation.h"
#include "hyper_grad.h"
#include "hyper_linear.h"
#include "networks.h"

namespace hyperfast::HF_ISA {

// ---- the layout of a network ----

static inline Index params_of(const Net& net) {
  Index n = 0;
  for (Index l = 0; l < net.count; ++l) n += net.layers[l].out * (net.layers[l].in + net.bias);
  return n;
}

// The widest layer, input and output included.
static inline Index widest(const Net& net) {
  Index n = net.layers[0].in;
  for (Index l = 0; l < net.count; ++l) n = max(n, net.layers[l].out);
  return n;
}

// The backward pass needs the pre-activations of every layer but a last one that nothing follows.
static inline bool is_kept(const Net& net, Index l) {
  return l + 1 < net.count || net.layers[l].act != Act::identity;
}

static inline Index outputs_of(const Net& net) {
  Index n = 0;
  for (Index l = 0; l < net.count; ++l) n += net.layers[l].out;
  return n;
}

static inline Index kept_width(const Net& net) {
  Index n = 0;
  for (Index l = 0; l < net.count; ++l)
    if (is_kept(net, l)) n += net.layers[l].out;
  return n;
}

// Rows of `columns` elements one behind another, in their natural order.
static inline Rows dense_rows(void* data, const Groups& g, Index columns) {
  return {data, g.ragged ? 0 : g.rows * columns, columns, 1};
}

// ---- layer by layer ----

// The head's part for the layer whose parameters begin at `first`.
template <class T>
static HeadMatrix matrix_of(const NetHead& head, const Layer& l, Index first) {
  return {static_cast<T*>(head.weight) + first * head.row, l.in * head.row, head.row, head.feature,
          head.bias ? static_cast<T*>(head.bias) + first * head.bias_step : nullptr,
          l.in * head.bias_step, head.bias_step};
}
template <class T>
static HeadMatrix vector_of(const NetHead& head, const Layer& l, Index first, bool bias) {
  if (!bias) return {};
  HeadMatrix m = matrix_of<T>(head, l, first + l.out * l.in);
  m.out = m.in, m.in = 0;
  m.bias_out = m.bias_in, m.bias_in = 0;
  return m;
}

// Threads share n elements in whole vectors of any type: what is computed one by one does not depend on them.
template <class F>
static void each_stretch(Index n, const F& body) {
  constexpr Index some = 64;
  parallel(ceil_div(n, some), parallel_work / 8 / some,
           [&](Index begin, Index end) { body(begin * some, min(end * some, n) - begin * some); });
}

template <class T>
static void hyper_mlp_by_layers(const HyperMlp& p) {
  const Index rows = total_rows(p.groups), most = widest(p.net);
  Rows x = p.x;
  T* hidden = static_cast<T*>(p.hidden);
  Index first = 0;
  for (Index l = 0; l < p.net.count; ++l) {
    const Layer& layer = p.net.layers[l];
    T* a = l + 1 == p.net.count ? static_cast<T*>(p.y.data)
                                : scratch<T>(l % 2 ? Slot::hidden_a : Slot::hidden_b, max(rows * most, 1));
    T* z = hidden && is_kept(p.net, l) ? hidden : a;
    const Index params = layer.out * (layer.in + p.net.bias);
    const Plan plan = default_plan(Makes::weights, p.dtype, p.groups, params, p.features, has_matrix_unit);
    hyper_linear_typed<T>({p.dtype, plan, p.groups, layer.out, layer.in, p.features, x, p.h,
                           matrix_of<T>(p.head, layer, first),
                           vector_of<T>(p.head, layer, first, p.net.bias),
                           dense_rows(z, p.groups, layer.out)});
    each_stretch(rows * layer.out, [&](Index at, Index n) { activate<T>(layer, n, z + at, a + at); });
    if (z != a) hidden += rows * layer.out;
    x = dense_rows(a, p.groups, layer.out);
    first += params;
  }
}

template <class T>
static void hyper_mlp_backward_by_layers(const HyperMlpBackward& b) {
  using C = Acc<T>;
  HyperMlp p = b.forward;
  const Index rows = total_rows(p.groups), most = widest(p.net), sums = p.groups.tasks * p.features;
  const Index kept = rows * kept_width(p.net);
  if (!p.hidden && kept > 0) {  // computed again
    p.hidden = scratch<T>(Slot::again, kept);
    const Index out = p.net.layers[p.net.count - 1].out;
    p.y = dense_rows(scratch<T>(Slot::hidden_c, max(rows * most, 1)), p.groups, out);
    hyper_mlp_by_layers<T>(p);
  }
  const T* z = static_cast<const T*>(p.hidden) + kept;  // read backwards
  T* grad = static_cast<T*>(b.grad.data);
  const auto back_through = [&](const Layer& layer, T* g, T* a) {
    z -= rows * layer.out;
    each_stretch(rows * layer.out, [&](Index at, Index n) {
      slope<T>(layer, n, z + at, g + at, a ? a + at : nullptr);
    });
  };
  if (is_kept(p.net, p.net.count - 1)) back_through(p.net.layers[p.net.count - 1], grad, nullptr);

  // In the accumulation type, lest the sum over the layers be rounded after each.
  C* total = accumulator<T>(b.grad_h, sums);
  T* inputs = scratch<T>(Slot::hidden_c, max(rows * most, 1));
  Index first = params_of(p.net);
  for (Index l = p.net.count - 1; l >= 0; --l) {
    const Layer& layer = p.net.layers[l];
    const Index params = layer.out * (layer.in + p.net.bias);
    first -= params;
    const Plan plan =
        default_plan(Makes::weights, p.dtype, p.groups, layer.out * layer.in, p.features, has_matrix_unit);
    const Plan grad_plan = default_plan(Makes::gradients, p.dtype, p.groups, params, p.features, has_matrix_unit);
    const HeadMatrix matrix = matrix_of<T>(p.head, layer, first);
    const HeadMatrix vector = vector_of<T>(p.head, layer, first, p.net.bias);
    const Rows g = dense_rows(grad, p.groups, layer.out);
    T* next = l == 0 ? static_cast<T*>(b.grad_x)
                     : scratch<T>(l % 2 ? Slot::hidden_a : Slot::hidden_b, max(rows * most, 1));
    if (next) {
      hyper_linear_typed<T>({p.dtype, plan, p.groups, layer.in, layer.out, p.features, g, p.h,
                             matrix.transposed(), {}, dense_rows(next, p.groups, layer.in)});
    }
    if (l > 0) back_through(p.net.layers[l - 1], next, inputs);
    const Rows x = l > 0 ? dense_rows(inputs, p.groups, layer.in) : p.x;
    const auto of_layer = [&](void* all, Index each) { return all ? static_cast<T*>(all) + first * each : nullptr; };
    hyper_linear_grad_typed<T>({p.dtype, grad_plan, p.groups, layer.out, layer.in, p.features, p.net.bias, g, x, p.h,
                                matrix, vector, nullptr, of_layer(b.grad_weight, p.features), of_layer(b.grad_bias, 1)},
                               total, l + 1 < p.net.count);
    grad = next;
  }
  round_off<T>(total, sums, b.grad_h);
}

// ---- many rows a task ----

// So many rows a piece that the weights, once made, are used often enough to be worth storing, in the
// forward and in the backward pass, where their gradients are formed once instead of twice; and fewer
// pieces than it takes to make packing the head worthwhile.
constexpr Index many_rows = 48, many_grad_rows = 24, few_pieces = 4;

// A network larger than this (256 KiB of float) leaves no room for its rows in the second-level cache.
template <class C>
constexpr Index largest_network = (256 << 10) / Index(sizeof(C));

// Weights (or their gradients) of a block of networks: 9 MiB, so that the head and its gradient, which lie in memory,
// are read for many at a time. With twice as many their own way to and from the caches takes longer.
template <class C>
constexpr Index networks_elements = (9 << 20) / Index(sizeof(C));

// Networks at a time, of so many: whole tiles of them (36 of the largest fit), and about as many each time.
template <class C>
static Index networks_together(Index params, Index pieces) {
  const Index most = networks_elements<C> / params / tile_rows * tile_rows;
  const Index times = ceil_div(pieces, most);
  return times > 1 ? round_up(ceil_div(pieces, times), tile_rows) : max(pieces, 1);
}

template <class T>
static bool by_network(const HyperMlp& p, Index many) {
  const Index pieces = max(p.groups.pieces, 1);
  return params_of(p.net) <= largest_network<Acc<T>> &&
         (pieces <= few_pieces || total_rows(p.groups) >= many * pieces);
}

// A network as it is applied: where its parameters start, and for layers that are applied to more rows
// than dot products are good for, their matrices turned into rows of whole vectors of outputs.
template <class W, class C>
struct Network {
  const W* weights;
  const float* affine;  // of int8 weights
  const C* turned;      // or null
  Index ahead;          // from these weights to those needed next
};

static inline bool is_turned(const Layer& l) { return l.out > few_outputs; }

template <class C>
static Index turned_elements(const Net& net) {
  Index n = 0;
  for (Index l = 0; l < net.count; ++l)
    if (is_turned(net.layers[l])) n += net.layers[l].in * round_up(net.layers[l].out, width<C>);
  return n;
}

// The matrices of a network turned, or null where `rows` are too few for it.
template <class W, class C>
static const C* turn_network(const Net& net, const W* weights, bool biases, Index rows) {
  if (rows <= few_rows) return nullptr;
  C* const turned = scratch<C>(Slot::turned, max(turned_elements<C>(net), 1));
  C* to = turned;
  for (Index l = 0; l < net.count; ++l) {
    const Layer& layer = net.layers[l];
    if (is_turned(layer)) {
      const Index row = round_up(layer.out, width<C>);
      pack<C, W>(layer.in, layer.out, {weights, 1, layer.in}, to, row, row);
      to += layer.in * row;
    }
    weights += layer.out * (layer.in + biases);
  }
  return turned;
}

// y (m, out) = x (m, in) times one layer's matrix w (out, in), plus init.
template <class W, class C>
static void apply_matrix(const Layer& l, Index m, View<const C> x, const W* w, const C* turned, Index ahead,
                         View<const C> init, View<C> y) {
  if (m <= few_rows && !turned) {
    if (x.col != 1) x = compact(x, m, l.in, Slot::local_b);
    dots<C, W>(l.out, m, l.in, {w, l.in, 1}, x.data, x.row, init.transposed(), y.transposed(), ahead);
  } else if (!is_turned(l)) {
    if (x.col != 1) x = compact(x, m, l.in, Slot::local_b);
    if constexpr (std::is_same_v<W, C>) {
      dots<C, C>(m, l.out, l.in, x, w, l.in, init, y);
    } else {
      C* wide = scratch<C>(Slot::local_d, l.out * l.in);
      for (Index j = 0; j < l.out * l.in; ++j) wide[j] = widen(w[j]);
      dots<C, C>(m, l.out, l.in, x, wide, l.in, init, y);
    }
  } else {
    const Index row = round_up(l.out, width<C>);
    for (Index j = 0; j < l.out; j += lanes<C>) {
      const int n = int(min(lanes<C>, l.out - j));
      sweep<C, false>(m, int(ceil_div(n, width<C>)), l.in, x, turned + j, row, 0,
                      init.data ? init.at(0, j) : init, y.at(0, j), n);
    }
  }
}

// The layers of one network for m rows, the last one's output in y (m, out); `spare` is for two hidden
// layers. `keep(l, z)` sees the pre-activations (m, out) of layer l, and says whether what follows is
// wanted. Rows of a layer lie one behind another.
template <class W, class C, class F>
static void run_layers(const Net& net, const Network<W, C>& network, Index m, View<const C> x, C* spare,
                       Index spare_each, C* y, const F& keep) {
  const W* w = network.weights;
  const float* affine = network.affine;
  const C* turned = network.turned;
  for (Index l = 0; l < net.count; ++l) {
    const Layer& layer = net.layers[l];
    C* to = l + 1 == net.count ? y : spare + l % 2 * spare_each;
    const Index matrix = layer.out * layer.in;
    View<const C> init{};
    if (net.bias && !affine) {
      if constexpr (std::is_same_v<W, C>) {
        init = {w + matrix, 0, 1};
      } else {
        C* bias = scratch<C>(Slot::local_c, layer.out);
        for (Index o = 0; o < layer.out; ++o) bias[o] = widen(w[matrix + o]);
        init = {bias, 0, 1};
      }
    }
    apply_matrix<W, C>(layer, m, x, w, network.turned ? turned : nullptr, network.ahead, init,
                       {to, layer.out, 1});
    if (affine) {
      for (Index r = 0; r < m; ++r)
        for (Index o = 0; o < layer.out; ++o) {
          C& v = to[r * layer.out + o];
          v = v * affine[o] + (net.bias ? affine[layer.out + o] : 0);
        }
      affine += layer.out * (1 + net.bias);
    }
    if (!keep(l, to)) return;
    activate<C>(layer, m * layer.out, to, to);
    w += matrix + (affine ? 0 : layer.out * net.bias);
    if (is_turned(layer)) turned += layer.in * round_up(layer.out, width<C>);
    x = {to, layer.out, 1};
  }
}

// Rows at a time: a hidden layer of them takes 64 KiB at most.
template <class C>
static Index chunk_rows(const Net& net) {
  return min(max((64 << 10) / Index(sizeof(C)) / widest(net) / tile_rows * tile_rows, tile_rows), 512);
}

// The rows of one piece through its network, a chunk at a time.
template <class T, class W>
static void run_piece(const Net& net, const Groups& groups, const Piece& q, const Rows& x, const Rows& y,
                      void* hidden, Network<W, Acc<T>> network) {
  using C = Acc<T>;
  const Index chunk = chunk_rows<C>(net), most = chunk * widest(net), rows = total_rows(groups);
  C* spare = scratch<C>(Slot::block, 3 * most);
  network.turned = turn_network<W, C>(net, network.weights, net.bias && !network.affine, q.end - q.begin);
  const Index out = net.layers[net.count - 1].out;
  for (Index r = q.begin; r < q.end; r += chunk) {
    const Piece part{q.task, r, min(r + chunk, q.end)};
    const View<const C> inputs = gather<T>(x, groups, part, net.layers[0].in, Slot::local_a);
    const bool direct = in_place<T>(groups);
    C* to = direct ? reinterpret_cast<C*>(row_data<T>(y, groups, part, r)) : spare + 2 * most;
    T* z = static_cast<T*>(hidden);
    run_layers<W, C>(net, network, part.end - part.begin, inputs, spare, most, to,
                     [&](Index l, const C* from) {
                       if (!z || !is_kept(net, l)) return true;
                       const Index width = net.layers[l].out;
                       scatter<T>(dense_rows(z, groups, width), groups, part, width, from, nullptr, 0);
                       z += rows * width;
                       return true;
                     });
    if (!direct) scatter<T>(y, groups, part, out, to, nullptr, 0);
  }
}

template <class T>
static void hyper_mlp_by_network(const HyperMlp& p) {
  using C = Acc<T>;
  const Index params = params_of(p.net), pieces = p.groups.pieces;
  const Index block = networks_together<C>(params, pieces);
  const Index rows_each = ceil_div(total_rows(p.groups), max(pieces, 1));
  C* w = scratch<C>(Slot::networks, max(block * params, 1));
  for (Index u0 = 0; u0 < pieces; u0 += block) {
    const Index n = min(block, pieces - u0);
    generate_networks<T>(network_block<T>(p, u0, n, params), 0, w);
    parallel(n, max(parallel_work / max(rows_each * params, 1), 1), [&](Index first, Index last) {
      for (Index u = first; u < last; ++u)
        run_piece<T, C>(p.net, p.groups, piece(p.groups, u0 + u), p.x, p.y, p.hidden,
                        {w + u * params, nullptr, nullptr, 0});
    });
  }
}

// The gradients of one piece: g (params) of its network's parameters, and of x. Pre-activations that were
// not kept are computed again: to write and read them would take longer.
template <class T>
static void differentiate_piece(const HyperMlpBackward& b, const Piece& q, const Acc<T>* w, Acc<T>* g) {
  using C = Acc<T>;
  static const C one = 1;
  const HyperMlp& p = b.forward;
  const Net& net = p.net;
  const Index params = params_of(net), rows = total_rows(p.groups), outputs = outputs_of(net);
  const Index chunk = chunk_rows<C>(net), most = chunk * widest(net);
  const bool again = !p.hidden && kept_width(net) > 0;
  C* spare = scratch<C>(Slot::block, 3 * most + (again ? chunk * outputs : 0));
  C* inputs = spare + 2 * most;
  Network<C, C> network{w, nullptr, nullptr, 0};
  if (again) network.turned = turn_network<C, C>(net, w, net.bias, q.end - q.begin);
  for (Index j = 0; j < params; ++j) g[j] = 0;
  for (Index r = q.begin; r < q.end; r += chunk) {
    const Piece part{q.task, r, min(r + chunk, q.end)};
    const Index m = part.end - part.begin;
    View<const C> x0 = gather<T>(p.x, p.groups, part, net.layers[0].in, Slot::local_d);
    if (x0.col != 1) x0 = compact(x0, m, net.layers[0].in, Slot::local_d);
    const T* kept = static_cast<const T*>(p.hidden) + (p.hidden ? rows * kept_width(net) : 0);
    C* computed = inputs + most;
    if (again)
      run_layers<C, C>(net, network, m, x0, spare, most, inputs, [&](Index l, const C* from) {
        const Index n = m * net.layers[l].out;
        for (Index j = 0; j < n; ++j) computed[j] = from[j];
        computed += n;
        return l + 1 < net.count && is_kept(net, l + 1);
      });
    // g *= f'(z), a = f(z) for the rows of a layer, which are (m, out), one behind another.
    const auto back_through = [&](const Layer& layer, C* to, C* a) {
      if (again) {
        computed -= m * layer.out;
        return slope<C>(layer, m * layer.out, computed, to, a);
      }
      kept -= rows * layer.out;
      const Rows from = dense_rows(const_cast<T*>(kept), p.groups, layer.out);
      const View<const C> z = gather<T>(from, p.groups, part, layer.out, Slot::local_c);
      slope<C>(layer, m * layer.out, z.data, to, a);
    };
    View<const C> grad = gather<T>(b.grad, p.groups, part, net.layers[net.count - 1].out, Slot::local_a);
    if (is_kept(net, net.count - 1)) {
      const Index out = net.layers[net.count - 1].out;
      C* own = spare + net.count % 2 * most;
      for (Index j = 0; j < m; ++j)
        for (Index o = 0; o < out; ++o) own[j * out + o] = grad.data[j * grad.row + o * grad.col];
      back_through(net.layers[net.count - 1], own, nullptr);
      grad = {own, out, 1};
    }
    Index first = params;
    for (Index l = net.count - 1; l >= 0; --l) {
      const Layer& layer = net.layers[l];
      const Index matrix = layer.out * layer.in;
      first -= matrix + layer.out * net.bias;
      C* next = spare + l % 2 * most;
      const bool wanted = l > 0 || b.grad_x;
      if (wanted)
        multiply<C, C>(m, layer.in, layer.out, grad, View<const C>{w + first, layer.in, 1}, {},
                       {next, layer.in, 1});
      View<const C> x;
      if (l > 0) {
        back_through(net.layers[l - 1], next, inputs);
        x = {inputs, layer.in, 1};
      } else {
        if (wanted)
          scatter<T>(dense_rows(b.grad_x, p.groups, layer.in), p.groups, part, layer.in, next, nullptr, 0);
        x = x0;
      }
      C* to = g + first;
      if (layer.in < layer.out) {  // lanes along the longer side
        const View<C> turned{to, 1, layer.in};
        multiply<C, C>(layer.in, layer.out, m, x.transposed(), grad, {to, 1, layer.in}, turned);
      } else {
        multiply<C, C>(layer.out, layer.in, m, grad.transposed(), x, {to, layer.in, 1}, {to, layer.in, 1});
      }
      if (net.bias)
        multiply<C, C>(1, layer.out, m, {&one, 0, 0}, grad, {to + matrix, layer.out, 1},
                       {to + matrix, layer.out, 1});
      grad = {next, layer.in, 1};
    }
  }
}

template <class T>
static void hyper_mlp_backward_by_network(const HyperMlpBackward& b) {
  using C = Acc<T>;
  const HyperMlp& p = b.forward;
  const Index params = params_of(p.net), pieces = p.groups.pieces, features = p.features;
  const Index block = networks_together<C>(params, pieces);
  const Index rows_each = ceil_div(total_rows(p.groups), max(pieces, 1));
  C* g = scratch<C>(Slot::gradients, block * params);
  C* grad_h = b.grad_h ? scratch<C>(Slot::hidden_b, max(block * features, 1)) : nullptr;
  C* task_h = scratch<C>(Slot::hidden_c, max(features, 1));  // the sum over the pieces of one task
  Index task = -1;
  // Sums over the blocks, in the accumulation type.
  C *sum_weight = nullptr, *sum_bias = nullptr;
  if constexpr (std::is_same_v<C, T>) {
    sum_weight = static_cast<C*>(b.grad_weight);
    sum_bias = static_cast<C*>(b.grad_bias);
  } else {
    C* sums = scratch<C>(Slot::sums, params * (features + 1));
    if (b.grad_weight) sum_weight = sums;
    if (b.grad_bias) sum_bias = sums + params * features;
  }
  // Without a gradient of x the first layer's weights are not needed, unless it is computed again.
  const Layer& inputs = p.net.layers[0];
  const bool again = !p.hidden && kept_width(p.net) > 0;
  const Index used = b.grad_x || again ? 0 : inputs.out * (inputs.in + p.net.bias);
  const Index made = params - used;
  C* w = scratch<C>(Slot::networks, used + block * made);  // from w + used on: w is where the first network would start
  T* to_h = static_cast<T*>(b.grad_h);
  if (to_h)
    for (Index j = 0; j < p.groups.tasks * features; ++j) to_h[j] = narrow<T>(0);

  Index u0 = 0;
  do {  // once even without pieces: the gradients are then zero
    Index n = min(block, pieces - u0);
    const NetworkBlock<T> networks = network_block<T>(p, u0, n, params);
    generate_networks<T>(networks, used, w + used);
    parallel(n, max(parallel_work / max(2 * rows_each * params, 1), 1), [&](Index first, Index last) {
      for (Index u = first; u < last; ++u)
        differentiate_piece<T>(b, piece(p.groups, u0 + u), w + u * made, g + u * params);
    });
    differentiate_head<T>(networks, g, grad_h, sum_weight, sum_bias, u0 > 0);
    for (Index u = 0; to_h && u < n; ++u) {  // pieces of a task are next to each other
      const bool first = piece(p.groups, u0 + u).task != task;
      task = piece(p.groups, u0 + u).task;
      for (Index k = 0; k < features; ++k) {
        task_h[k] = first ? grad_h[u * features + k] : task_h[k] + grad_h[u * features + k];
        to_h[task * features + k] = narrow<T>(task_h[k]);
      }
    }
    u0 += block;
  } while (u0 < pieces);

  if constexpr (!std::is_same_v<C, T>) {
    if (sum_weight)
      for (Index j = 0; j < params * features; ++j) static_cast<T*>(b.grad_weight)[j] = narrow<T>(sum_weight[j]);
    if (sum_bias)
      for (Index j = 0; j < params; ++j) static_cast<T*>(b.grad_bias)[j] = narrow<T>(sum_bias[j]);
  }
}

// ---- the ops ----

template <class T, class W>
static void task_mlp_typed(const TaskMlp& p) {
  using C = Acc<T>;
  const Index params = params_of(p.net);
  const Index rows_each = ceil_div(total_rows(p.groups), max(p.groups.pieces, 1));
  const auto weights = [&](Index task) { return static_cast<const W*>(p.weight) + task * p.weight_task; };
  parallel(p.groups.pieces, max(parallel_work / max(rows_each * params, 1), 1), [&](Index first, Index last) {
    for (Index i = first; i < last; ++i) {
      const Piece q = piece(p.groups, i);
      const W* w = weights(q.task);
      const Index ahead = i + 1 < last ? weights(piece(p.groups, i + 1).task) - w : 0;
      const float* affine =
          p.affine ? static_cast<const float*>(p.affine) + q.task * p.affine_task : nullptr;
      run_piece<T, W>(p.net, p.groups, q, p.x, p.y, nullptr, Network<W, C>{w, affine, nullptr, ahead});
    }
  });
}

static void task_mlp(const TaskMlp& p) {
  if (p.affine)
    return task_mlp_typed<float, std::int8_t>(p);
  with_type(p.dtype, [&](auto t) { task_mlp_typed<decltype(t), decltype(t)>(p); });
}

static void hyper_mlp(const HyperMlp& p) {
  with_type(p.dtype, [&](auto t) {
    using T = decltype(t);
    (by_network<T>(p, many_rows) ? hyper_mlp_by_network<T> : hyper_mlp_by_layers<T>)(p);
  });
}

static void hyper_mlp_backward(const HyperMlpBackward& b) {
  with_type(b.forward.dtype, [&](auto t) {
    using T = decltype(t);
    (by_network<T>(b.forward, many_grad_rows) ? hyper_mlp_backward_by_network<T> : hyper_mlp_backward_by_layers<T>)(b);
  });
}

}  // namespace hyperfast::HF_ISA
