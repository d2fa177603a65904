// What the kernels of a HyperLSTM are given: typed pointers, all contiguous. Gates are ordered i,
// f, g, o. The equations are in hyperfast/nets/hyper_lstm_steps.py.
#pragma once

#include "kernels.h"

namespace hyperfast {

// Gains and shifts of the layer normalisations of an LSTM with n units: of its gates (4, n), of its
// cell (n). All are null where there is none.
template <class C>
struct LstmNorm {
  C *scale, *shift, *c_scale, *c_shift;
};

// Of the main LSTM (., H), and of the hyper LSTM (., E).
template <class C>
struct LstmState {
  C *h, *c, *hyper_h, *hyper_c;

  // From sequence `row` on, of LSTMs with so many units; what is null stays null.
  LstmState from(Index row, Index hidden, Index hyper) const {
    return {h + row * hidden, c ? c + row * hidden : c, hyper_h ? hyper_h + row * hyper : hyper_h,
            hyper_c ? hyper_c + row * hyper : hyper_c};
  }
  operator LstmState<const C>() const { return {h, c, hyper_h, hyper_c}; }
};

template <class C>
struct LstmWeights {
  C *ih, *hh;  // (4H + 4E, I) and (4H + 4E, H), of the main LSTM, then of the hyper LSTM
  C *hyper_hh, *hyper_bias;  // (4E, E), (4E)
  C *z, *z_bias;             // (12 n, E), (12 n): the embeddings, by kind, h, x, b, then by gate
  C *d, *bias;               // (12, H, n), (4, H)
  LstmNorm<C> norm, hyper_norm;
};

// All steps of all sequences. Rows are those of a PackedSequence: one step's after another's, and
// sequence j is row j of every step that it has.
template <class C>
struct HyperLstm {
  Index ins, hidden, hyper, embedding;
  Index steps, rows;
  const Index* sizes;  // how many sequences have each step, never more than the one before
  const C* x;          // (rows, I)
  const C* keep;       // (rows, H), of recurrent dropout, or null
  LstmState<const C> start;
  LstmWeights<const C> w;
  LstmState<C> states;  // of every row; all but h may be null: not kept
  // (rows, made_width()), or null: x and h times the weights of the main LSTM, and what enters the
  // gates of the hyper LSTM.
  C* made;
  LstmState<C> ends;  // of every sequence after its last step

  Index sequences() const { return steps ? sizes[0] : 0; }
  Index gates() const { return 4 * (hidden + hyper); }
  Index made_width() const { return 8 * hidden + 4 * hyper; }
};

// Its gradients, from what a forward pass kept.
template <class C>
struct HyperLstmBackward {
  HyperLstm<C> forward;  // without ends
  const C* grad_h;       // (rows, H), or null
  LstmState<C> carried;  // the gradients of ends, which those of start replace
  C* x;                  // of x, or null: not wanted
  LstmWeights<C> w;      // matrices may be null: not wanted; norms are where the weights' are
};

}  // namespace hyperfast
