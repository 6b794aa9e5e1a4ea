PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Python compiles what it imports, and it imports a part of what pip would compile.
PIP_INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile -c constraints.txt
CPP_FILES := $(shell find csrc -name '*.cpp' -o -name '*.h')
BUILD_INPUTS := pyproject.toml constraints.txt setup.py CMakeLists.txt $(filter-out csrc/tests/%,$(CPP_FILES))
DEMO_OUT ?= runs/demo
SEEDS ?= 0,1,2
BENCH_OUT ?= runs/bench
INTERPRETED := $(addprefix python_tests/,$(addprefix ops/test_,nt_xent.py cross_logsumexp.py \
  paired_logsumexp.py info_nce.py self_logsumexp.py nt_xent_labels.py sup_con.py cross_logsumexp_calls.py \
  compile_numbers.py limits.py prediction_loss.py registration.py) \
  distributed/test_nt_xent.py distributed/test_decoupled.py modules/test_module_state.py \
  $(addprefix triton/test_,kernels.py interpreter.py plans.py hopper.py hopper_gradients.py \
  saved_rows.py prediction_blocks.py))

.PHONY: help demo test coverage config-check gpu-check gluon-check ctest ctest-aarch64 headers-check sanitize lint format \
  bench bench-quick bench-record bench-compare docs examples kill-test release-check clean
.DELETE_ON_ERROR:

# Containers often forbid Python to keep bytecode. Every process would then compile what it imports again.
export PYTHONDONTWRITEBYTECODE :=

# Every target has its description beside it, after two number signs.
help: ## this list
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / { printf "make %-14s %s\n", $$1, $$2 }' Makefile
	@echo "Everything lives in .venv. A second call installs again only if something that it depends on has changed."

# The build tools come first because the package is built without isolation, so that the pinned
# versions are the ones in use.
$(VENV)/.base: constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python 3.10 or newer is needed: make PYTHON=python3.x")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "Installing build tools and PyTorch"
	$(PIP_INSTALL) torch setuptools wheel cmake ninja pybind11
	touch $@

$(VENV)/.train: $(VENV)/.base $(BUILD_INPUTS)
	@echo "Installing cjepa_kernels with what training needs"
	$(PIP_INSTALL) --no-build-isolation -e '.[train]'
	touch $@

$(VENV)/.dev: $(VENV)/.base $(BUILD_INPUTS)
	@echo "Installing cjepa_kernels with what tests and checks need"
	CJEPA_REQUIRE_NATIVE=1 CJEPA_WERROR=1 CJEPA_BUILD_DIR=build/ctest \
	  $(PIP_INSTALL) --no-build-isolation -e '.[test,lint,bench,docs]'
	touch $@ $(VENV)/.train $(VENV)/.docs

$(VENV)/.docs: $(VENV)/.base $(BUILD_INPUTS)
	@echo "Installing cjepa_kernels with what the documentation needs"
	$(PIP_INSTALL) --no-build-isolation -e '.[docs]'
	touch $@

demo: $(VENV)/.train ## train C-JEPA, JEPA and the contrastive term alone, and write a report (SEEDS=0,1,2)
	$(BIN)/cjepa compare --config configs/cjepa.yaml --seeds $(SEEDS) --out $(DEMO_OUT)

# A process that has no tests left takes half of those that the other one still has.
TWO_PROCESSES := -n 2 --dist worksteal

# Twice: Triton's kernels run in its interpreter, which has to be asked for from the start.
test: $(VENV)/.dev ## run the test suite
	$(BIN)/python -m pytest $(TWO_PROCESSES)
	TRITON_INTERPRET=1 $(BIN)/python -m pytest $(TWO_PROCESSES) -k "triton" $(INTERPRETED)

# Tracing makes the tests half as long again, so it is a run of its own.
coverage: $(VENV)/.dev ## run the test suite and show which lines it reaches; below 90 % it fails
	$(BIN)/python -m pytest $(TWO_PROCESSES) --cov --cov-report=term

# $(call run_cpp_tests,build directory,sanitizers)
comma := ,
define run_cpp_tests
	$(BIN)/cmake -G Ninja -S . -B build/$(1) -DCJEPA_TESTS=ON -DCJEPA_SANITIZE=$(2) -DCJEPA_WERROR=ON \
	  -DCMAKE_MAKE_PROGRAM=$(abspath $(BIN)/ninja) -DPython_EXECUTABLE=$(abspath $(BIN)/python) \
	  -Dpybind11_DIR=$$($(BIN)/python -m pybind11 --cmakedir) >build/$(1).log || { cat build/$(1).log; exit 1; }
	$(BIN)/cmake --build build/$(1) --target cpp_tests
	$(BIN)/ctest --test-dir build/$(1) -j 2 --output-on-failure --no-tests=error
endef

# In the directory that the installation was built in: it has most object files.
ctest: $(VENV)/.base ## run the C++ tests of the CPU kernel, for every instruction set of the machine
	mkdir -p build
	$(call run_cpp_tests,ctest,)

# The tile core alone: the rest needs a PyTorch for that machine. Static, so that no library of it is needed.
AARCH64_CXX ?= aarch64-linux-gnu-g++
QEMU_AARCH64 ?= $(shell command -v qemu-aarch64-static || command -v qemu-aarch64)
ctest-aarch64: $(VENV)/.base ## run the tests of the tile core for ARM under QEMU
	@command -v $(AARCH64_CXX) >/dev/null && test -n "$(QEMU_AARCH64)" || { \
	  echo "A cross compiler and QEMU are needed; on Debian: apt-get install g++-aarch64-linux-gnu qemu-user-static"; exit 1; }
	mkdir -p build
	$(BIN)/cmake -G Ninja -S . -B build/aarch64 -DCJEPA_TESTS=ON -DCJEPA_WERROR=ON \
	  -DCMAKE_SYSTEM_NAME=Linux -DCMAKE_SYSTEM_PROCESSOR=aarch64 -DCMAKE_CXX_COMPILER=$(AARCH64_CXX) \
	  -DCMAKE_CROSSCOMPILING_EMULATOR=$(QEMU_AARCH64) -DCMAKE_EXE_LINKER_FLAGS=-static \
	  -DCMAKE_MAKE_PROGRAM=$(abspath $(BIN)/ninja) -DPython_EXECUTABLE=$(abspath $(BIN)/python) \
	  -Dpybind11_DIR=$$($(BIN)/python -m pybind11 --cmakedir) >build/aarch64.log || { cat build/aarch64.log; exit 1; }
	$(BIN)/cmake --build build/aarch64 --target tile_core_test
	$(BIN)/ctest --test-dir build/aarch64 -R '^tile_core' --output-on-failure --no-tests=error

# Downloads wheels of some 500 MB, once.
OLDEST_TORCH := $(shell sed -n 's/^dependencies = \["torch>=\(.*\)"\]/\1/p' pyproject.toml)
headers-check: $(VENV)/.base ## compile csrc against the headers of the oldest and the newest PyTorch
	$(BIN)/python csrc/check_headers.py $(OLDEST_TORCH) latest

sanitize: $(VENV)/.base ## run the C++ tests under ASan and UBSan, and the threads under TSan
	mkdir -p build
	$(call run_cpp_tests,asan,address$(comma)undefined)
	$(call run_cpp_tests,tsan,thread)

lint: $(VENV)/.dev ## check style and types; nothing is rewritten
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run -Werror $(CPP_FILES)

format: $(VENV)/.dev ## let the formatters rewrite
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CPP_FILES)

bench: $(VENV)/.dev ## time each operator and compare the loss with other formulas: ten minutes
	$(BIN)/python -m pytest bench/test_micro.py --benchmark-enable --benchmark-only --benchmark-columns=median,iqr,rounds
	$(BIN)/cjepa bench --out $(BENCH_OUT)

bench-quick: $(VENV)/.dev ## compare the loss with other formulas: about a minute
	$(BIN)/cjepa bench --quick --out $(BENCH_OUT)

bench-record: $(VENV)/.dev ## record that comparison in docs/; draw the pictures and write the figures of the documents
	$(BIN)/python bench/record.py
	$(BIN)/python docs/draw_results.py
	$(BIN)/python docs/generate_figures.py

bench-compare: $(VENV)/.dev ## say whether HEAD is slower than a revision (BASE=main SIZES=256x256,2048x256)
	$(BIN)/python bench/compare.py $(BASE) $(if $(SIZES),--sizes $(SIZES))

# On a machine with a GPU, PyTorch and Triton, and no network: python3 is the one that has them.
GPU_CHECK_OUT ?= runs/gpu-check
gpu-check: ## test and time the GPU kernels on a machine with a GPU, in at most 6 minutes
	$(PYTHON) bench/gpu_check.py --out $(GPU_CHECK_OUT)

# The newest Triton lies in a folder of its own, and Python finds it before the installed one. Its warning is about a
# default of the release after it.
gluon-check: export CJEPA_TEST_EVERY_GLUON_KERNEL := 1
gluon-check: $(VENV)/.dev ## compile every Gluon kernel with the oldest and the newest Triton, without a GPU: two minutes
	$(BIN)/python -m pytest python_tests/triton/test_hopper_compile.py
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --upgrade --target build/newest_triton triton
	TRITON_DEFAULT_FP_FUSION=1 PYTHONPATH=build/newest_triton $(BIN)/python -m pytest python_tests/triton/test_hopper_compile.py

config-check: $(VENV)/.train ## give every key of the configuration every kind of bad value: a minute
	$(BIN)/python python_tests/support/config_fuzz.py

# The theme announces its successor at every build, which is no warning about these documents.
docs: export NO_MKDOCS_2_WARNING := 1

docs: $(VENV)/.docs ## build the documentation as a site in site/; a warning is a failure
	$(BIN)/mkdocs build --strict

examples: $(VENV)/.train ## run every script in examples/
	for script in examples/*.py; do echo "== $$script"; $(BIN)/python $$script || exit 1; done

kill-test: $(VENV)/.dev ## kill training runs at random, damage their files and compare the results: minutes
	OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 $(BIN)/python python_tests/support/kill_and_resume.py --kills 20

# dist/ holds both; each is installed beside PyTorch alone, the sdist compiling again.
RELEASE := build/release
release-check: $(VENV)/.base ## build wheel and sdist and try both in new environments
	$(PIP_INSTALL) build twine
	rm -rf dist $(RELEASE)
	$(BIN)/python -m build --no-isolation --sdist
	CJEPA_REQUIRE_NATIVE=1 $(BIN)/python -m build --no-isolation --wheel
	$(BIN)/twine check --strict dist/*
	$(PYTHON) -m venv $(RELEASE)/wheel
	$(RELEASE)/wheel/bin/pip install --quiet -c constraints.txt dist/*.whl
	$(RELEASE)/wheel/bin/python python_tests/support/wheel_smoke.py
	$(PYTHON) -m venv $(RELEASE)/sdist
	$(RELEASE)/sdist/bin/pip install --quiet -c constraints.txt torch setuptools wheel cmake ninja pybind11
	CJEPA_REQUIRE_NATIVE=1 $(RELEASE)/sdist/bin/pip install --quiet --no-build-isolation dist/*.tar.gz
	$(RELEASE)/sdist/bin/python python_tests/support/wheel_smoke.py

clean: ## remove .venv and everything that was built, trained or measured
	rm -rf $(VENV) build dist runs site *.egg-info cjepa_kernels/_C*.so .coverage* .pytest_cache .mypy_cache .ruff_cache
