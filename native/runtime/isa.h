// Which kernel tables this processor can run.
#pragma once
#include <string>
#include <vector>

#include "../kernels/table.h"

namespace isotherm {

// Slowest first, so that the last one is the default; scalar is always there.
std::vector<const KernelTable*> available_tables();

// The one of that name; null where this processor has none.
const KernelTable* find_table(const std::string& name);

}  // namespace isotherm
