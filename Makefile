# make demo   set up, train C-JEPA, JEPA and the contrastive term alone, and write a report
# make test   set up and run the test suite
# Everything lives in .venv; a second call installs again only when what it depends on has changed.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP_INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
BUILD_INPUTS := pyproject.toml constraints.txt setup.py CMakeLists.txt $(wildcard csrc/*.* csrc/cpu/*)
DEMO_OUT ?= runs/demo
SEEDS ?= 0,1,2
BENCH_OUT ?= runs/bench
INTERPRETED := $(addprefix python_tests/,$(addprefix ops/test_,nt_xent.py cross_logsumexp.py \
  cross_logsumexp_calls.py compile_numbers.py limits.py prediction_loss.py registration.py) \
  distributed/test_nt_xent.py modules/test_module_state.py triton/test_kernels.py triton/test_interpreter.py)

.PHONY: help demo test coverage config-check gpu-check gpu-count ctest ctest-aarch64 headers-check sanitize lint format \
  bench bench-quick bench-targets bench-record bench-compare bench-loss bench-distributed memory micro plot \
  docs docs-serve examples kill-test release-check clean
.DELETE_ON_ERROR:

help:
	@sed -n 's/^# \{0,1\}//p' Makefile | head -3
	@echo "make ctest  C++ tests of the CPU kernel;  make sanitize runs them under sanitizers"
	@echo "make coverage  the tests once more, and which lines they reach"
	@echo "make ctest-aarch64  those of the tile core for ARM, under QEMU"
	@echo "make headers-check  whether csrc compiles against the oldest and the newest PyTorch's headers"
	@echo "make lint   checks of style and types;  make format rewrites"
	@echo "make bench-quick  the loss beside other formulas, about a minute;  make bench all of it, ten minutes"
	@echo "make bench-compare BASE=REV  whether HEAD is slower than a revision"
	@echo "make bench-record  make bench's comparison into docs/, and the README's picture"
	@echo "make bench-targets  time and accuracy of the loss beside its targets;  make memory its peak memory"
	@echo "make bench-loss  time of the whole C-JEPA loss and the share of each part"
	@echo "make bench-distributed  work, time and memory of two processes that share a batch"
	@echo "make micro  time of each operator;  make plot draws what make bench-targets recorded"
	@echo "make config-check  every key of the configuration with every kind of bad value"
	@echo "make gpu-check  tests and benchmarks of the Triton kernels on a machine with a GPU"
	@echo "make gpu-count  instructions of the Triton kernels, counted in their machine code"
	@echo "make docs   the documentation as a site, in site/;  make docs-serve shows it while you write"
	@echo "make examples runs every script in examples/"
	@echo "make kill-test  kills training runs at random, damages their files, and compares the end; minutes"
	@echo "make release-check  builds wheel and sdist, and tries both in new environments"
	@echo "make clean  removes .venv and everything that was built, trained or measured"

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

demo: $(VENV)/.train
	$(BIN)/cjepa compare --config configs/cjepa.yaml --seeds $(SEEDS) --out $(DEMO_OUT)

# Twice: Triton's kernels run in its interpreter, which has to be asked for from the start.
test: $(VENV)/.dev
	$(BIN)/python -m pytest -n 2
	TRITON_INTERPRET=1 $(BIN)/python -m pytest -n 2 -k "triton" $(INTERPRETED)

# Tracing makes the tests half as long again, so it is a run of its own.
coverage: $(VENV)/.dev
	$(BIN)/python -m pytest -n 2 --cov --cov-report=term

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
ctest: $(VENV)/.base
	mkdir -p build
	$(call run_cpp_tests,ctest,)

# The tile core alone: the rest needs a PyTorch for that machine. Static, so that no library of it is needed.
AARCH64_CXX ?= aarch64-linux-gnu-g++
QEMU_AARCH64 ?= $(shell command -v qemu-aarch64-static || command -v qemu-aarch64)
ctest-aarch64: $(VENV)/.base
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
headers-check: $(VENV)/.base
	$(BIN)/python csrc/check_headers.py $(OLDEST_TORCH) latest

sanitize: $(VENV)/.base
	mkdir -p build
	$(call run_cpp_tests,asan,address$(comma)undefined)
	$(call run_cpp_tests,tsan,thread)

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run -Werror $(wildcard csrc/*.cpp csrc/*.h csrc/*/*.cpp csrc/*/*.h)

format: $(VENV)/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(wildcard csrc/*.cpp csrc/*.h csrc/*/*.cpp csrc/*/*.h)

bench: $(VENV)/.dev
	$(MAKE) micro
	$(BIN)/cjepa bench --out $(BENCH_OUT)

bench-quick: $(VENV)/.dev
	$(BIN)/cjepa bench --quick --out $(BENCH_OUT)

bench-targets: $(VENV)/.dev
	$(BIN)/python bench/nt_xent.py

# The full comparison into docs/results and docs/images, and the README's picture, of the machines named here.
bench-record: $(VENV)/.dev
	$(BIN)/python bench/record.py
	$(BIN)/python bench/headline.py --cpu docs/results/amd-epyc-avx2.json --gpu bench/results/NVIDIA-*.json

bench-compare: $(VENV)/.dev
	$(BIN)/python bench/compare.py $(BASE)

bench-loss: $(VENV)/.dev
	$(BIN)/python bench/cjepa_loss.py

bench-distributed: $(VENV)/.dev
	$(BIN)/python bench/distributed_cost.py
	$(BIN)/python bench/distributed.py

memory: $(VENV)/.dev
	$(BIN)/python bench/nt_xent_memory.py

# On a machine with a GPU, PyTorch and Triton, and no network: python3 is the one that has them.
gpu-check:
	$(PYTHON) bench/gpu_check.py

# Every key of the configuration with every kind of bad value, and with its documented bounds.
config-check: $(VENV)/.train
	$(BIN)/python python_tests/support/config_fuzz.py

# Instructions of the Triton kernels in their machine code; needs no GPU.
gpu-count: $(VENV)/.dev
	$(BIN)/python bench/gpu_machine_code.py

micro: $(VENV)/.dev
	$(BIN)/python -m pytest bench/test_micro.py --benchmark-enable --benchmark-only --benchmark-columns=median,iqr,rounds

plot: $(VENV)/.dev
	$(BIN)/python bench/plot.py

# The theme announces its successor at every build, which is no warning about these documents.
docs docs-serve: export NO_MKDOCS_2_WARNING := 1

docs: $(VENV)/.docs
	$(BIN)/mkdocs build --strict

docs-serve: $(VENV)/.docs
	$(BIN)/mkdocs serve

examples: $(VENV)/.train
	for script in examples/*.py; do echo "== $$script"; $(BIN)/python $$script || exit 1; done

kill-test: $(VENV)/.dev
	OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 $(BIN)/python python_tests/support/kill_and_resume.py --kills 20

# dist/ holds both; each is installed beside PyTorch alone, the sdist compiling again.
RELEASE := build/release
release-check: $(VENV)/.base
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

clean:
	rm -rf $(VENV) build dist runs site *.egg-info cjepa_kernels/_C*.so .coverage* .pytest_cache .mypy_cache .ruff_cache
