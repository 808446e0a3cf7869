#include "arch_list.h"

#include <cstdlib>
#include <sstream>

namespace int8_ops::cuda {

std::string why_not_runnable(const std::string& archs, int major, int minor) {
  std::istringstream list(archs);
  for (std::string arch; std::getline(list, arch, ';');) {
    const bool ptx = arch.find("+PTX") != std::string::npos;
    const bool exact = arch.find('a') != std::string::npos;
    const size_t dot = arch.find('.');
    if (dot == std::string::npos) continue;
    const int arch_major = std::atoi(arch.c_str());
    const int arch_minor = std::atoi(arch.c_str() + dot + 1);
    const bool same = arch_major == major && arch_minor == minor;
    const bool binary = same || (!exact && arch_major == major && arch_minor <= minor);
    const bool forward =
        ptx && !exact && (arch_major < major || (arch_major == major && arch_minor <= minor));
    if (binary || forward) return "";
  }
  std::ostringstream out;
  out << "built for " << archs << "; this device is " << major << '.' << minor;
  if (major < 8) {
    out << ", and the kernels need 8.0 or newer";
  } else {
    out << ": rebuild with TORCH_CUDA_ARCH_LIST=" << major << '.' << minor;
  }
  return out.str();
}

bool holds_sm90a(const std::string& archs) {
  std::istringstream list(archs);
  for (std::string arch; std::getline(list, arch, ';');) {
    if (arch == "9.0a" || arch == "9.0a+PTX") return true;
  }
  return false;
}

}  // namespace int8_ops::cuda
