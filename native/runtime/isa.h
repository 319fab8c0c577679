// Which kernel tables this processor can run.
#pragma once
#include <vector>

#include "../kernels/table.h"

namespace isotherm {

// Slowest first, so that the last one is the default; scalar is always there.
std::vector<const KernelTable*> available_tables();

}  // namespace isotherm
