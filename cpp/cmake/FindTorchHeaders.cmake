# torch's headers and the one library to be linked. Found through Python, since the folder differs between an isolated
# build and an installed torch; torch itself is not imported (seconds), only located.
find_package(Python REQUIRED COMPONENTS Interpreter)
execute_process(
  COMMAND "${Python_EXECUTABLE}" -c
    "import importlib.util, pathlib; print(pathlib.Path(importlib.util.find_spec('torch').origin).parent, end='')"
  OUTPUT_VARIABLE NATTEN_TORCH_ROOT RESULT_VARIABLE result ERROR_QUIET)
if(NOT result EQUAL 0 OR NOT EXISTS "${NATTEN_TORCH_ROOT}/include/torch/csrc/stable/library.h")
  message(FATAL_ERROR "natten needs the headers of torch >= 2.10 to build: "
    "pip install torch (then pip install --no-build-isolation .), or let pip build in isolation")
endif()
file(READ "${NATTEN_TORCH_ROOT}/version.py" torch_version)
string(REGEX MATCH "__version__ = '([^']+)'" _ "${torch_version}")
set(NATTEN_TORCH_VERSION "${CMAKE_MATCH_1}")
string(REGEX MATCH "cuda[^=\n]*= '([^']+)'" _ "${torch_version}")
set(NATTEN_TORCH_CUDA "${CMAKE_MATCH_1}")

# The stable ABI of torch 2.10: the library built here loads in every later torch.
add_library(torch_stable INTERFACE)
target_include_directories(torch_stable SYSTEM INTERFACE "${NATTEN_TORCH_ROOT}/include")
target_compile_definitions(torch_stable INTERFACE TORCH_TARGET_VERSION=0x020a000000000000)
# libtorch.so alone is named as needed. libtorch_cpu.so would hide CUDA's symbols from the weak lookup, and
# libtorch_cuda.so does not exist in a torch without CUDA.
target_link_libraries(torch_stable INTERFACE -Wl,--no-as-needed "${NATTEN_TORCH_ROOT}/lib/libtorch.so" -Wl,--as-needed)
