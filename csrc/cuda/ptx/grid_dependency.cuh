// Programmatic dependent launch, sm_90 and up; nothing on older devices, which launch in order.
// PTX ISA, "Miscellaneous Instructions: griddepcontrol". See Note [Dependent launch] in launch.cuh.
#pragma once

namespace int8_ops::ptx {

// Returns when every grid before this one in the stream has finished and its writes are visible.
// PTX ISA: griddepcontrol.wait.
__device__ __forceinline__ void grid_dependency_wait() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// The next grid's blocks may start once every block of this one has said so (or ended).
// PTX ISA: griddepcontrol.launch_dependents.
__device__ __forceinline__ void grid_dependency_trigger() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;");
#endif
}

}  // namespace int8_ops::ptx
