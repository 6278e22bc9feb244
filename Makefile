# Every target sets up what it needs: an environment in $(VENV), the packages, the build in place.
# Every step leaves a stamp file, so that it runs again only when it has to.

PYTHON ?= python3
VENV ?= .venv
ifeq ($(origin VENV),file)
TORCH ?= torch==2.13.0
else
TORCH ?= torch>=2.11# an environment of the user's own: the torch that is there will do
endif
TORCH_CUDA ?= torch==2.14.1
MAX_JOBS ?= $(shell getconf _NPROCESSORS_ONLN)
export MAX_JOBS
export PIP_DISABLE_PIP_VERSION_CHECK := 1

PY = $(VENV)/bin/python
PIP = $(PY) -m pip install
stamp = $(shell printf %s '$1' | tr -c '[:alnum:].' _)
INSTALLED := $(VENV)/.torch-$(call stamp,$(TORCH))
BUILT := build/.built-$(call stamp,$(VENV))
CODE := $(shell find csrc -type f)
TEST_CODE := $(shell find tests -name '*.h' -o -name '*.cpp') $(wildcard benchmarks/*.cpp)
RUNS = build/bench
MINUTES ?= 40

# All of them change the same environment.
.NOTPARALLEL:
.PHONY: help demo demo-ddp effects test lint format tables bench gpu cuda-check clean

help:
	@echo 'make demo        train on real images with native, converted and no BatchNorm -> demo.png'
	@echo 'make demo-ddp    train in 2 processes with and without SyncBatchNorm -> demo_ddp.png'
	@echo 'make effects     try what the literature says that normalization does -> effects.png'
	@echo 'make test        build in place and run the tests    (PYTEST="-k convert" picks some)'
	@echo 'make lint        check style and measured tables     (make format and make tables mend it)'
	@echo 'make bench       measure layers and training steps   (BENCH=--quick for a smoke run)'
	@echo 'make gpu         test, tune and measure the CUDA kernels on a GPU  (MINUTES=40)'
	@echo 'make cuda-check  build the CUDA kernels with nvcc; needs no GPU'
	@echo 'make clean       remove everything that these made, environments included'
	@echo 'PYTHON=$(PYTHON) VENV=$(VENV) TORCH="$(TORCH)" can be set on the command line.'

demo: $(BUILT) $(VENV)/.demo
	$(PY) examples/demo.py

demo-ddp: $(BUILT) $(VENV)/.demo
	$(PY) -m torch.distributed.run --standalone --nproc_per_node=2 examples/train_ddp.py

effects: $(BUILT) $(VENV)/.demo
	$(PY) examples/effects.py

# The tests of a file stay in one process, with what the file sets up once.
test: $(BUILT) $(VENV)/.test
	$(PY) -m pytest -n 2 --dist loadfile $(PYTEST)

# Both sides of each comparison under glibc, then under tcmalloc.
bench: $(BUILT) $(VENV)/.bench
	$(PY) benchmarks/bench.py --allocator both --runs $(if $(BENCH),1,3) --out $(RUNS) $(BENCH)
	$(PY) benchmarks/bench.py --family --allocator both --runs $(if $(BENCH),1,3) --out $(RUNS) $(BENCH)
	$(PY) benchmarks/bench.py --fused --allocator both --runs $(if $(BENCH),1,3) --out $(RUNS) $(BENCH)
	$(PY) benchmarks/model.py --allocator both --out $(RUNS) $(BENCH)
	$(PY) benchmarks/model.py --settings --out $(RUNS) $(BENCH)
	$(PY) benchmarks/bench_sync.py --allocator tcmalloc --out $(RUNS) $(BENCH)

# The tables of README.md and docs, from benchmarks/results.
tables: $(VENV)/.lint
	$(PY) benchmarks/report.py

# With the Python, the torch and the nvcc at hand: nothing is installed.
gpu:
	$(PYTHON) benchmarks/gpu_run.py --minutes $(MINUTES) $(GPU)

lint: $(VENV)/.lint
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/clang-format --dry-run --Werror $(CODE) $(TEST_CODE)
	$(PY) benchmarks/report.py --check

format: $(VENV)/.lint
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .
	$(VENV)/bin/clang-format -i $(CODE) $(TEST_CODE)

clean:
	rm -rf build dist *.egg-info .venv .venv-cuda .pytest_cache .ruff_cache .hypothesis demo.png demo_ddp.png effects.png
	rm -f batchnorm_ext/*.so batchnorm_ext/_build.py

# There is one build in place, whichever environment it is for: the stamps of others are void.
$(BUILT): $(INSTALLED) setup.py $(CODE)
	@echo 'building the kernels, which takes minutes'
	$(PIP) --quiet --no-build-isolation --no-deps --editable .
	@mkdir -p build && rm -f build/.built-* && touch $@

$(INSTALLED): | $(VENV)/.pip
	$(PIP) "$(TORCH)"
	$(PIP) --quiet --group build
	@rm -f $(VENV)/.torch-* && touch $@

$(VENV)/.demo: examples/requirements.txt | $(VENV)/.pip
	$(PIP) --quiet --requirement $<
	@touch $@

# The dependency group of that name in pyproject.toml.
$(addprefix $(VENV)/.,test bench lint): $(VENV)/.%: pyproject.toml | $(VENV)/.pip
	$(PIP) --quiet --group $*
	@touch $@

USABLE = import ensurepip, os, shutil, sys, sysconfig, venv; \
	header = os.path.join(sysconfig.get_path("include"), "Python.h"); \
	compiler = shutil.which(os.environ.get("CXX", "c++")); \
	sys.exit(not (compiler and os.path.exists(header) and sys.version_info >= (3, 10)))

$(VENV)/.pip:
	@test -x $(PY) || $(PYTHON) -c '$(USABLE)' 2>/dev/null || { \
	echo "$(PYTHON) must be Python >= 3.10 with venv and C headers, and there must be a C++ compiler" \
	"(Debian, Ubuntu: apt install python3-venv python3-dev g++)."; exit 1; }
	@test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(PIP) --quiet "pip>=25.1"
	@touch $@

# In an environment of its own, and from a source distribution: the build in place stays as it is.
cuda-check:
	$(MAKE) .cuda-check VENV=.venv-cuda TORCH="$(TORCH_CUDA)"

.PHONY: .cuda-check
.cuda-check: $(INSTALLED)
	rm -rf build/sdist
	$(PY) setup.py --quiet sdist --dist-dir build/sdist
	@echo 'building the CUDA kernels, which takes minutes'
	BATCHNORM_EXT_CUDA=1 TORCH_CUDA_ARCH_LIST="8.0 9.0" NVCC_APPEND_FLAGS=-Xptxas=-v \
	$(PIP) --verbose --no-build-isolation --no-deps --force-reinstall build/sdist/*.tar.gz >build/cuda.log 2>&1 \
	|| { tail -n 100 build/cuda.log; exit 1; }
	$(PY) .ci/check_cuda.py build/cuda.log
