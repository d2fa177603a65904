// The face of the kernels: plain structs over raw pointers, no torch type.
//
// Everything here has already been checked (torch/): pointers are valid for the sizes and strides
// given, task numbers are in range. Strides are in elements, may be zero, and are 64-bit
// throughout.
#pragma once

#include <cstdint>

#include "isa/simd/activation.h"

namespace hyperfast {

using Index = std::int64_t;

// What the tensors of one call are stored as. f64 accumulates in f64, all others in f32.
enum class Dtype { f64, f32, bf16, f16 };

// Row j of task b starts at data + b * task + j * row; its elements are `col` apart.
// When rows are ragged (task_ids), j counts all rows of the batch and `task` is zero.
struct Rows {
  void* data;
  Index task, row, col;
};

// One matrix a task, shape (out, in).
struct TaskMatrix {
  void* data;
  Index task, out_stride, in_stride;
};

// One vector a task; data may be null (absent).
struct TaskVector {
  void* data;
  Index task, col;
};

// Rows begin, ..., end - 1 of one task: positions in `order` when ragged, else row numbers.
struct Piece {
  Index task, begin, end;
};

// The rows of every task, cut into pieces of at most `cut` rows so that threads share big tasks.
// Batched: `per_task` pieces of each task, in turn. Ragged: `order` lists the row numbers sorted by
// task.
struct Groups {
  Index tasks;
  Index rows;    // of one task (batched), of all together (ragged)
  Index pieces;  // how many
  Index cut, per_task;
  bool ragged = false;
  const Index* order = nullptr;
  const Piece* list = nullptr;
};

struct TaskLinear {
  Dtype dtype;
  Groups groups;
  Index out, in;
  Rows x;  // width in
  TaskMatrix weight;
  TaskVector bias;  // width out
  Rows y;           // width out, col == 1
};

// A matrix of low rank a task, B_b A_b.
struct LowRankCall {
  Dtype dtype;  // f64 or f32
  Groups groups;
  Index out, in, rank;
  TaskMatrix a, b;  // (rank, in), (out, rank)
};

// y[r] = init[r] + B_b A_b x[r] + bias_b.
struct LowRank : LowRankCall {
  Rows x;           // width in
  TaskVector bias;  // width out
  Rows init;        // width out, col == 1; data may be null (absent)
  Rows y;           // width out, col == 1
};

// Its gradients; those that are null are not wanted. All are contiguous.
struct LowRankGrad : LowRankCall {  // groups: for gradients of tasks, with a piece for each
  Rows grad;                        // width out, col == 1
  Rows x;                           // width in
  Rows grad_x;                      // width in
  void* grad_a;                     // (tasks, rank, in)
  void* grad_b;                     // (tasks, out, rank)
  void* grad_bias;                  // (tasks, out)
};

struct TaskLinearGradWeight {
  Dtype dtype;
  Groups groups;  // never cut: one piece a task, every task present
  Index out, in;
  Rows grad;  // width out
  Rows x;     // width in
  void* y;    // (tasks, out, in), contiguous
};

// What the head makes of features h: entry (o, i) of a task's matrix is <weight(o, i), h> + bias(o,
// i), where weight(o, i) starts at weight + o * out_stride + i * in_stride and its features are
// `feature` apart.
struct HeadMatrix {
  void* weight;
  Index out_stride, in_stride, feature;
  void* bias;  // or null
  Index bias_out_stride, bias_in_stride;

  // What maps outputs to inputs.
  HeadMatrix transposed() const {
    return {weight, in_stride, out_stride, feature, bias, bias_in_stride, bias_out_stride};
  }
};

// What becomes of a matrix, generated or stored, before it is used.
enum class Transform { none, abs, softplus, exp, square };

// How a layer runs: weights made row by row in registers, for rows side by side in the lanes, and
// the head read as it lies (contract); the head packed, and weights made slice by slice for blocks
// of tasks, in the cache (tile); the head read once as it lies, and weights made whole
// (materialize).
enum class Plan { contract, tile, materialize };

// y[r] = f(M_b) x[r] + v_b, both generated.
struct HyperLinear {
  Dtype dtype;
  Plan plan;
  Groups groups;
  Index out, in, features;
  Rows x;  // width in
  TaskVector h;
  HeadMatrix matrix;
  // Of one column, features as far apart; of a null weight, at most a shared bias.
  HeadMatrix vector;
  Rows y;  // width out, col == 1
  Transform transform = Transform::none;

  bool head_bias() const { return matrix.bias || (vector.weight && vector.bias); }
};

// Gradients of what makes the weights of a layer. With G_b = sum of grad[r] (x) x[r] over the rows
// of task b, times the transform's slope at M_b, they are grad_h[b] = sum over p of G_b(p)
// weight(p), grad_weight(p) = sum over b of G_b(p) h_b, grad_bias(p) = sum over b of G_b(p), where
// p counts the entries of the matrix, then those of the vector. Those that are null are not wanted.
struct HyperLinearGrad {
  Dtype dtype;
  Plan plan;
  Groups groups;
  Index out, in, features;
  bool has_bias;
  Rows grad;                  // width out
  Rows x;                     // width in
  TaskVector h;               // for grad_weight and the slope
  HeadMatrix matrix, vector;  // for grad_h and the slope, which takes the matrix's bias, too
  void* grad_h;               // (tasks, features), contiguous like the others
  void* grad_weight;          // (params, features)
  void* grad_bias;            // (params)
  Transform transform = Transform::none;

  Index params() const { return out * (in + has_bias); }
};

// Whose a layer's bias is. Kernels of whole networks know no shared ones.
enum class Bias { none, own, shared };

struct Layer {
  Index in, out;
  Act act;
  double parameter;  // of the activation
  Bias bias = Bias::none;
  Transform transform = Transform::none;
  Index begin = 0;    // its first parameter
  bool kept = false;  // whether the backward pass needs its pre-activations

  bool own_bias() const { return bias == Bias::own; }
  Index params() const { return out * (in + own_bias()); }
};

// A target network. Its parameters lie layer by layer: weight (out, in), then bias (out) of layers
// that have one.
struct Net {
  const Layer* layers;
  Index count;
  Index params, kept, widest;  // kept: outputs of the layers whose pre-activations are
  bool transforms;             // whether any layer has one
};

// What makes all parameters of a network: parameter p is <weight + p * row, h> + bias[p *
// bias_step].
struct NetHead {
  void* weight;
  Index row, feature;
  void* bias;  // or null
  Index bias_step;
};

// y[r] = the network generated for the row's task, applied to x[r].
struct HyperMlp {
  Dtype dtype;
  Groups groups;
  Net net;
  Index features;
  Rows x;
  TaskVector h;
  NetHead head;
  Rows y;  // contiguous
  void*
      preactivations;  // or null; layer by layer (rows, out), those of the last only if it is kept
};

// Gradients of the same; those that are null are not wanted. All are contiguous.
struct HyperMlpBackward {
  HyperMlp forward;  // without y; preactivations are null where they were not kept
  Rows grad;         // contiguous, written over where a last activation asks for it
  void* grad_x;
  void* grad_h;       // (tasks, features)
  void* grad_weight;  // (params, features)
  void* grad_bias;    // (params)
};

// Given parameters, of each task `weight_task` apart. With `scales_and_biases` they are int8,
// matrices without biases, and of every layer there are scales (out), then biases (out) if it has
// them, as floats.
struct TaskMlp {
  Dtype dtype;
  Groups groups;
  Net net;
  Rows x;
  void* weight;
  Index weight_task;
  void* scales_and_biases;
  Index scales_and_biases_task;
  Rows y;  // contiguous
};

// Gradients of the same, without scales; those that are null are not wanted.
struct TaskMlpBackward {
  Dtype dtype;
  Groups groups;  // with a piece for every task
  Net net;
  Rows x;
  void* weight;
  Index weight_task;
  const void* preactivations;  // as HyperMlp has them; null: made again
  Rows grad;
  void* grad_x;       // contiguous
  void* grad_weight;  // (tasks, params)
};

// hyper_lstm.h
template <class C>
struct HyperLstm;
template <class C>
struct HyperLstmBackward;
// mixer.h
template <class C>
struct Mixer;
template <class C>
struct MixerBackward;

// One entry per op; each instruction set fills in its own table.
struct Kernels {
  const char* isa;
  bool matrix_unit, pairs;  // whether there is an instruction for pairs of bf16
  void (*task_linear)(const TaskLinear&);
  void (*task_linear_grad_weight)(const TaskLinearGradWeight&);
  void (*low_rank)(const LowRank&);
  void (*low_rank_grad)(const LowRankGrad&);
  void (*hyper_linear)(const HyperLinear&);
  void (*hyper_linear_grad)(const HyperLinearGrad&);
  void (*hyper_mlp)(const HyperMlp&);
  void (*hyper_mlp_backward)(const HyperMlpBackward&);
  void (*task_mlp)(const TaskMlp&);
  void (*task_mlp_backward)(const TaskMlpBackward&);
  void (*hyper_lstm_f32)(const HyperLstm<float>&);
  void (*hyper_lstm_f64)(const HyperLstm<double>&);
  void (*hyper_lstm_backward_f32)(const HyperLstmBackward<float>&);
  void (*hyper_lstm_backward_f64)(const HyperLstmBackward<double>&);
  void (*mixer_f32)(const Mixer<float>&);
  void (*mixer_f64)(const Mixer<double>&);
  void (*mixer_backward_f32)(const MixerBackward<float>&);
  void (*mixer_backward_f64)(const MixerBackward<double>&);
};

}  // namespace hyperfast
