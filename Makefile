# One file for people and for CI. `make demo` and `make test` work from a fresh clone.
#   PYTHON=...          the interpreter the virtual environment is made with
#   WORKERS=...         processes that share the tests, of two threads each
#   ARGS=...            options of `make conformance`: --only NAME, --resume, --write, --choose
#   FXPRUNE_PYTHON=...  an interpreter that already has the packages: no environment is made, nothing is downloaded
PYTHON ?= python3
FXPRUNE_FUZZ ?= 5000
WORKERS ?= 2
ARGS ?=

SOURCES := pyproject.toml setup.py $(shell find csrc -type f 2>/dev/null)
PACKAGES := "setuptools>=77" wheel numpy sympy "pytest>=8" "pytest-xdist>=3.6" "hypothesis>=6.100" pytest-cov expecttest scikit-learn \
            transformers tqdm pyyaml huggingface_hub safetensors pillow "ruff>=0.15" "mypy>=1.15" "clang-format>=18"

ifdef FXPRUNE_PYTHON
PY := $(FXPRUNE_PYTHON)
READY := build/.ready
export PYTHONPATH := $(CURDIR)$(if $(PYTHONPATH),:$(PYTHONPATH))
else
PY := .venv/bin/python
READY := .venv/.ready
endif
# What reads the machine code of the CUDA kernels, where they can be compiled.
PACKAGES += $(if $(shell command -v nvcc),nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm)
# Options that share tests between processes, where the interpreter can.
SHARED = $$($(PY) -c 'import importlib.util as u; print("-n $(WORKERS) --dist worksteal" * bool(u.find_spec("xdist")))')
PIP := $(PY) -m pip install --quiet --disable-pip-version-check

.PHONY: demo test check bench conformance asan fuzz cuda-check gpu docs wheel clean help

help:
	@echo "make demo    prune, compile, verify and time three models beside stock torch.compile"
	@echo "make test    the tests"
	@echo "make check   formatting, lint, types, file sizes"
	@echo "make bench   whole-model benchmarks into benchmarks/results/, README.md and docs/benchmarks.md"
	@echo "make conformance  every timm family in four ways, compared with tests/conformance/families.csv"
	@echo "make asan    kernels under the address and undefined-behaviour sanitizers"
	@echo "make fuzz    property tests with FXPRUNE_FUZZ=$(FXPRUNE_FUZZ) examples each"
	@echo "make cuda-check   CUDA kernels without a GPU: simulator under sanitizers, what the compiler makes of them"
	@echo "make gpu     on a GPU: CUDA tests, sanitizers and benchmarks, within nine minutes"
	@echo "make docs    docs/options.md and docs/errors.md from the sources"
	@echo "make wheel   a wheel into dist/, checked and imported from a clean environment"
	@echo "make clean   remove what was built"

demo: $(READY)
	$(PY) examples/demo.py

test: $(READY)
	$(PY) -m pytest tests $(SHARED)

check: $(READY)
	$(PY) tools/check.py

bench: $(READY)
	$(PY) benchmarks/bench_models.py
	$(PY) benchmarks/bench_sweep.py
	$(PY) benchmarks/render.py

conformance: $(READY)
	$(PY) -m tests.conformance.families $(ARGS)

asan: $(READY)
	PYTHON="$(if $(findstring /,$(PY)),$(abspath $(PY)),$(PY))" bash tests/csrc/asan.sh

fuzz: $(READY)
	FXPRUNE_FUZZ=$(FXPRUNE_FUZZ) $(PY) -m pytest tests -m fuzz

cuda-check: $(READY)
	PYTHON="$(if $(findstring /,$(PY)),$(abspath $(PY)),$(PY))" bash tests/cuda/sanitize.sh
	FXPRUNE_FUZZ=$(FXPRUNE_FUZZ) $(PY) -m pytest tests/cuda -m fuzz
	$(PY) -m pytest tests/cuda -m "not fuzz" --ignore tests/cuda/test_sanitized.py
	$(PY) tools/cuda_resources.py

# With an interpreter of one's own there is nothing to prepare: the command builds within its time.
gpu: $(if $(FXPRUNE_PYTHON),,$(READY))
	$(PY) tools/gpu.py $(ARGS)

docs: $(READY)
	$(PY) tools/docs.py

wheel: $(READY)
	$(PY) tools/wheel.py

# The packages come first and once; a change in the sources only rebuilds, without a network.
.venv/.packages: Makefile
	@echo "fxprune: making .venv and installing packages"
	@test -x .venv/bin/python || $(PYTHON) -m venv .venv
	@.venv/bin/python -c "import importlib.util, sys; sys.exit(importlib.util.find_spec('torch') is None)" \
	  || $(PIP) torch==2.13.0
	@$(PIP) $(PACKAGES)
	@$(PIP) --no-deps timm
	@touch $@

.venv/.ready: .venv/.packages $(SOURCES)
	@echo "fxprune: building the kernels"
	@$(PIP) --no-build-isolation --no-deps -e .
	@touch $@

build/.ready: $(SOURCES)
	@echo "fxprune: building the kernels"
	@$(PY) setup.py --quiet build_ext --inplace egg_info
	@mkdir -p build && touch $@

clean:
	rm -rf build dist *.egg-info .venv/.ready .pytest_cache .mypy_cache .ruff_cache .hypothesis .coverage fxprune/*.so
	find fxprune passes lowering tests benchmarks examples tools -name __pycache__ -prune -exec rm -rf {} +
