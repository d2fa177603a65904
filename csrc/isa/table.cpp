// One build of the kernels. setup.py compiles this file once for every instruction set, each into
// the namespace HF_ISA; dispatch.cpp chooses between the tables.
#include "isa/layer/low_rank.h"
#include "isa/layer/task.h"
#include "isa/lstm/backward.h"
#include "isa/lstm/forward.h"
#include "isa/mixer/backward.h"
#include "isa/network/generated.h"
#include "isa/network/stored.h"
#include "isa/network/stored_grad.h"

#define HF_STRING(x) #x
#define HF_NAME(x) HF_STRING(x)

namespace hyperfast::HF_ISA {

extern const Kernels table;
const Kernels table = {
    HF_NAME(HF_ISA),
    has_matrix_unit,
    has_pair_dot,
    task_linear,
    task_linear_grad_weight,
    low_rank,
    low_rank_grad,
    hyper_linear,
    hyper_linear_grad,
    hyper_mlp,
    hyper_mlp_backward,
    task_mlp,
    task_mlp_backward,
    hyper_lstm<float>,
    hyper_lstm<double>,
    hyper_lstm_backward<float>,
    hyper_lstm_backward<double>,
    mixer<float>,
    mixer<double>,
    mixer_backward<float>,
    mixer_backward<double>,
};

}  // namespace hyperfast::HF_ISA
