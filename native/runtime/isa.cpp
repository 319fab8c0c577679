#include "isa.h"

namespace isotherm {

std::vector<const KernelTable*> available_tables() {
  std::vector<const KernelTable*> tables{&kScalarTable};
#if defined(__x86_64__)
  __builtin_cpu_init();  // asks the operating system too: registers that are not saved do not count
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c")) {
    tables.push_back(&kAvx2Table);
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vnni"))
      tables.push_back(&kAvx512Table);
  }
#endif
  return tables;
}

}  // namespace isotherm
