#include "isa.h"

#include <initializer_list>

#if defined(__x86_64__)
#include <cpuid.h>
#elif defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#elif defined(__aarch64__) && defined(__APPLE__)
#include <sys/sysctl.h>
#endif

namespace isotherm {
namespace {

#if defined(__x86_64__)
struct Registers {
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
};

Registers cpuid(unsigned leaf, unsigned subleaf) {
  Registers r;
  __get_cpuid_count(leaf, subleaf, &r.eax, &r.ebx, &r.ecx, &r.edx);  // zeros where the leaf is not there
  return r;
}

constexpr bool has(unsigned bits, std::initializer_list<int> wanted) {
  for (const int bit : wanted)
    if (!(bits >> bit & 1)) return false;
  return true;
}

// What the operating system saves of a thread; registers that it does not save do not count.
unsigned saved_registers() {
  unsigned low, high;
  __asm__("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return low;
}

// Asked of CPUID itself (Intel's manual, volume 2, CPUID): the compilers' own builtin for this knows no AVX-VNNI before
// GCC 11, and needs a run-time library that not every tool chain brings.
void add_tables(std::vector<const KernelTable*>& tables) {
  const Registers basic = cpuid(1, 0), extended = cpuid(7, 0);
  if (!has(basic.ecx, {27})) return;  // OSXSAVE: xgetbv is there
  const unsigned saved = saved_registers();
  const bool has_avx2 = has(saved, {1, 2}) && has(basic.ecx, {12, 28, 29}) && has(extended.ebx, {5});  // FMA, AVX, F16C
  if (!has_avx2) return;
  tables.push_back(&kAvx2Table);
  if (has(cpuid(7, 1).eax, {4})) tables.push_back(&kAvxVnniTable);
  // F, DQ, BW, VL; VNNI
  if (has(saved, {5, 6, 7}) && has(extended.ebx, {16, 17, 30, 31}) && has(extended.ecx, {11}))
    tables.push_back(&kAvx512Table);
}
#elif defined(__aarch64__) && (defined(__linux__) || defined(__APPLE__))
#if defined(__linux__)
bool has_dot_products() { return getauxval(AT_HWCAP) >> 20 & 1; }  // HWCAP_ASIMDDP
bool has_mixed_signs() { return getauxval(AT_HWCAP2) >> 13 & 1; }  // HWCAP2_I8MM
#else
bool has_feature(const char* name) {
  int value = 0;
  size_t size = sizeof value;
  return sysctlbyname(name, &value, &size, nullptr, 0) == 0 && value;
}
bool has_dot_products() { return has_feature("hw.optional.arm.FEAT_DotProd"); }
bool has_mixed_signs() { return has_feature("hw.optional.arm.FEAT_I8MM"); }
#endif

void add_tables(std::vector<const KernelTable*>& tables) {
  if (!has_dot_products()) return;
  tables.push_back(&kNeonTable);
  if (has_mixed_signs()) tables.push_back(&kNeonI8mmTable);
}
#else
void add_tables(std::vector<const KernelTable*>&) {}
#endif

}  // namespace

std::vector<const KernelTable*> available_tables() {
  std::vector<const KernelTable*> tables{&kScalarTable};
  add_tables(tables);
  return tables;
}

const KernelTable* find_table(const std::string& name) {
  for (const KernelTable* table : available_tables())
    if (name == table->name) return table;
  return nullptr;
}

}  // namespace isotherm
