// Quotients by numbers that the host knows.
#pragma once

#include <cstdint>

#include "partials.h"

namespace int8_ops::cuda::attention {

// Of numbers from 0 to 2^31 - 1, exact: the reciprocal, rounded up, has 31 bits more than the
// divisor, so that what it is too large by never reaches the next quotient (Granlund and
// Montgomery, Division by Invariant Integers using Multiplication, 1994). A division would be
// dozens of instructions, to be fetched before a kernel's first work can begin.
struct Divisor {
  uint32_t divisor = 1;
  uint32_t factor = 1u << 31;
  uint32_t shift = 31;

  static constexpr Divisor of(int32_t divisor) {
    Divisor d{static_cast<uint32_t>(divisor)};
    while ((uint64_t{1} << (d.shift - 31)) < d.divisor) ++d.shift;
    d.factor = static_cast<uint32_t>(((uint64_t{1} << d.shift) + d.divisor - 1) / d.divisor);
    return d;
  }
  INT8_OPS_HOST_DEVICE constexpr int32_t quotient(int32_t x) const {
    return static_cast<int32_t>(static_cast<uint64_t>(static_cast<uint32_t>(x)) * factor >> shift);
  }
  INT8_OPS_HOST_DEVICE constexpr int32_t remainder(int32_t x) const {
    return x - quotient(x) * static_cast<int32_t>(divisor);
  }
};

namespace divisor_checks {
constexpr bool divides(int32_t divisor) {
  const Divisor d = Divisor::of(divisor);
  constexpr int32_t kLast = 2147483647;
  const int32_t most = kLast / divisor * divisor;  // the last multiple
  return d.quotient(0) == 0 && d.quotient(divisor - 1) == 0 && d.quotient(divisor) == 1 &&
         d.quotient(most) == kLast / divisor && d.quotient(most - 1) == kLast / divisor - 1 &&
         d.quotient(kLast) == kLast / divisor && d.remainder(kLast) == kLast % divisor;
}
static_assert(divides(2) && divides(3) && divides(7) && divides(33) && divides(44) && divides(66) &&
              divides(128) && divides(132) && divides(641) && divides(65537) &&
              divides(715827883) && divides(2147483647));
static_assert(Divisor::of(1).quotient(2147483647) == 2147483647);
}  // namespace divisor_checks

}  // namespace int8_ops::cuda::attention
