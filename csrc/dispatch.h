#pragma once

#include <vector>

#include "kernels.h"

namespace hyperfast {

// The table for the best instruction set of this machine, or for the other that the environment
// variable HYPERFAST_ISA names. Throws std::invalid_argument when that one is unknown or absent.
const Kernels& kernels();

// The tables that can run on this machine, best first.
std::vector<const Kernels*> builds();

}  // namespace hyperfast
