# Said last, so that nobody builds without GPU kernels unknowingly.
if(NATTEN_CUDA_ARCHS)
  set(summary "with CUDA kernels for ${NATTEN_CUDA_ARCHS} (${NATTEN_CUDA_REASON}; nvcc ${CMAKE_CUDA_COMPILER_VERSION})")
else()
  set(summary "WITHOUT CUDA kernels (${NATTEN_CUDA_REASON}): CPU only. Set NATTEN_CUDA_ARCHS=all to build them")
endif()
message(STATUS "natten: built against torch ${NATTEN_TORCH_VERSION}, ${summary}")
add_custom_command(TARGET _natten POST_BUILD VERBATIM
  COMMAND "${CMAKE_COMMAND}" -E echo "natten: built ${summary}")
