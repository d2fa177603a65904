#pragma once

namespace hyperfast {

// For how many bf16 a float counts in products on the matrix unit: 3, and all of it; or 2 or 1,
// where torch.set_float32_matmul_precision, or torch.backends.mkldnn.matmul.fp32_precision, allows
// that.
int parts_of_float();

}  // namespace hyperfast
