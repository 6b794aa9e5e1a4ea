# C++ tests of the kernels. CJEPA_TESTS=ON adds the target `cpp_tests`, which builds them, and CTest
# entries that run them. CMakeLists.txt includes this file instead of adding a directory, because
# CMake keeps the flags of single files within one directory.
enable_testing()
add_custom_target(cpp_tests)
set(tests csrc/tests)

# Sets up a target for tests only and links it with the libraries that follow its name.
function(cjepa_configure_tests target)
  cjepa_compile(${target})
  set_target_properties(${target} PROPERTIES EXCLUDE_FROM_ALL ON CXX_VISIBILITY_PRESET hidden
    VISIBILITY_INLINES_HIDDEN ON BUILD_RPATH ${CJEPA_TORCH_DIR}/lib)
  target_link_libraries(${target} PRIVATE ${ARGN})
endfunction()

# The sanitizers of GCC 12 fail if the system randomises more than 28 bits of addresses. The tests run
# without randomisation if that is allowed.
if(CJEPA_SANITIZE)
  execute_process(COMMAND setarch -R true RESULT_VARIABLE refused OUTPUT_QUIET ERROR_QUIET)
  if(refused EQUAL 0)
    set(launcher setarch -R)
  endif()
endif()

if(CMAKE_CROSSCOMPILING_EMULATOR)  # because the programs are of another machine
  set(launcher ${CMAKE_CROSSCOMPILING_EMULATOR})
endif()

# CTest begins with the last of these programs and runs all others after them. The longest tests come
# first, so that at the end none of them runs alone on one core.
set(shortest_first memory_test nt_xent_test self_logsumexp_test cross_logsumexp_test
  prediction_loss_test)

# Adds a test: its name, its program, and the variables of its environment. A test skips itself, by its
# exit code, if this machine lacks its instruction set.
function(cjepa_add_test name program)
  add_test(NAME ${name} COMMAND ${launcher} $<TARGET_FILE:${program}>)
  list(FIND shortest_first ${program} cost)  # -1 for the others
  set_tests_properties(${name} PROPERTIES
    ENVIRONMENT "${ARGN}" SKIP_RETURN_CODE 77 TIMEOUT 600 COST ${cost})
endfunction()

# Code with sanitizers compiles slowly, so some instruction sets are compiled without them, and the
# sanitizers' tests leave them out. All of them have the same source; only the size of registers and
# of tiles differs. The address sanitizer takes the smallest and the largest ones of this machine. The
# thread sanitizer takes those that the operators choose, because the cores know nothing of threads.
set(checked_sets ${instruction_sets})
if(CJEPA_SANITIZE AND EXISTS /proc/cpuinfo)
  file(STRINGS /proc/cpuinfo flags REGEX "avx512vl" LIMIT_COUNT 1)
  if(NOT flags)
    list(REMOVE_ITEM checked_sets avx512 avx512_bf16)
  elseif(CJEPA_SANITIZE STREQUAL "thread")
    list(REMOVE_ITEM checked_sets baseline avx2)
  else()
    list(REMOVE_ITEM checked_sets avx2)
  endif()
endif()
foreach(set ${instruction_sets})
  if(NOT set IN_LIST checked_sets)
    set_property(SOURCE ${core}_${set}.cpp APPEND
      PROPERTY COMPILE_OPTIONS -O0 -fno-sanitize=all)
  endif()
endforeach()

# Every header includes what it uses: a file that includes nothing else compiles. A header of the core
# is compiled as the baseline compiles it.
if(NOT CJEPA_SANITIZE)
  file(GLOB headers CONFIGURE_DEPENDS csrc/*.h csrc/cpu/*.h csrc/cpu/core/*.h csrc/cuda/*.h)
  foreach(header ${headers})
    get_filename_component(name ${header} NAME_WE)
    file(GENERATE OUTPUT ${CMAKE_BINARY_DIR}/headers/${name}.cpp CONTENT "#include \"${header}\"\n")
    list(APPEND header_sources ${CMAKE_BINARY_DIR}/headers/${name}.cpp)
  endforeach()
  add_library(headers OBJECT ${header_sources})
  cjepa_configure_tests(headers)
  cjepa_link_torch(headers)
  target_compile_definitions(headers PRIVATE CJEPA_VECTOR_BYTES=16 CJEPA_MICRO_ROWS=6)
  add_dependencies(cpp_tests headers)
endif()

# The expected values are computed by optimised code without sanitizers.
add_library(test_loop STATIC ${tests}/nt_xent_loop.cpp ${tests}/cross_logsumexp_loop.cpp
  ${tests}/prediction_loss_loop.cpp)
cjepa_configure_tests(test_loop)
target_compile_options(test_loop PRIVATE -O2 -fno-sanitize=all)

# Several programs share these.
add_library(test_main OBJECT ${tests}/check.cpp)
cjepa_configure_tests(test_main)
# These threads take the place of PyTorch's; threads.cpp says why.
add_library(test_threads OBJECT ${tests}/threads.cpp)
cjepa_configure_tests(test_threads)
cjepa_link_torch(test_threads)

add_executable(tile_core_test ${tests}/similarity_test.cpp ${tests}/product_test.cpp
  ${tests}/rows_test.cpp)
cjepa_configure_tests(tile_core_test test_main core)
set(operators nt_xent cross_logsumexp self_logsumexp prediction_loss)
foreach(name ${operators} memory)
  add_executable(${name}_test ${tests}/${name}_test.cpp)
  cjepa_configure_tests(${name}_test test_main test_threads driver core test_loop)
  cjepa_link_torch(${name}_test)
  add_dependencies(cpp_tests ${name}_test)
endforeach()
target_sources(self_logsumexp_test PRIVATE ${tests}/class_similarity_test.cpp)
target_sources(prediction_loss_test PRIVATE ${tests}/tensor_memory_test.cpp)

add_library(fake_cuda MODULE ${tests}/fake_cuda.cpp)
cjepa_configure_tests(fake_cuda)
add_executable(plan_test ${tests}/plan_test.cpp)
cjepa_configure_tests(plan_test test_main plans driver core)
cjepa_link_torch(plan_test)
target_compile_definitions(plan_test PRIVATE CJEPA_FAKE_CUDA="$<TARGET_FILE:fake_cuda>")
add_dependencies(plan_test fake_cuda)
add_dependencies(cpp_tests plan_test)

cjepa_add_test(memory memory_test)
cjepa_add_test(plan plan_test)
set(poisoned CJEPA_POISON_MEMORY=1)
if(CJEPA_SANITIZE STREQUAL "thread")
  foreach(name ${operators})
    cjepa_add_test(${name} ${name}_test ${poisoned})
  endforeach()
  return()
endif()
add_dependencies(cpp_tests tile_core_test)
foreach(set ${checked_sets})
  cjepa_add_test(tile_core.${set} tile_core_test CJEPA_INSTRUCTION_SET=${set})
endforeach()
# The cache is off. A block from the cache may be larger than what was asked for, so an address
# sanitizer would not see a write beyond that.
set(uncached CJEPA_CACHE_MIB=0)
if(CJEPA_SANITIZE)
  # The operators run with the smallest and with the largest registers of this machine, and the thread
  # sanitizer runs them with the cache.
  foreach(name ${operators})
    cjepa_add_test(${name}.baseline ${name}_test ${poisoned} CJEPA_INSTRUCTION_SET=baseline
      ${uncached})
    cjepa_add_test(${name} ${name}_test ${poisoned} ${uncached})
  endforeach()
  return()
endif()
foreach(name ${operators})
  foreach(set ${instruction_sets})
    cjepa_add_test(${name}.${set} ${name}_test ${poisoned} CJEPA_INSTRUCTION_SET=${set} ${uncached})
  endforeach()
  cjepa_add_test(${name}.cached ${name}_test ${poisoned})
endforeach()
