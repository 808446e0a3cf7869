#include "dispatch.h"

#include <stdexcept>

#include "isa.h"

namespace int8_ops::cpu {
namespace {

const KernelTable& table_for(const std::string& isa) {
  for (const KernelTable* table : {&kPortableKernels}) {
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
