#include "dispatch.h"

#include <stdexcept>

#include "isa.h"

namespace int8_ops::cpu {
namespace {

const KernelTable& table_for(const std::string& isa) {
  static constexpr const KernelTable* kTables[] = {
      &kPortableKernels,
#if defined(__x86_64__)
      &kAvx2Kernels,
      &kAvx512VnniKernels,
#endif
  };
  for (const KernelTable* table : kTables) {
    if (isa == table->isa) return *table;
  }
  throw std::logic_error("int8_ops: no kernel table for the instruction set " + isa);
}

}  // namespace

const KernelTable& kernels() {
  static const KernelTable& table = table_for(selected_isa());
  return table;
}

}  // namespace int8_ops::cpu
