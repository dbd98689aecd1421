# Every target prepares its own environment: on a fresh machine `make demo` and `make test` are enough.
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.polybit-ready
TRITON := .venv/.triton-ready

.PHONY: setup demo test check slow docs clean

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt CMakeLists.txt $(wildcard polybit/kernels/csrc/*)
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[report,allocate,data,train,judge,serve,export,docs,dev]'
	touch $(STAMP)

demo: setup
	$(BIN)/python -m polybit.demo

# The GPU kernels are tested without a GPU, by triton's interpreter and compiler; where there is no wheel they are skipped.
$(TRITON): $(STAMP)
	-$(BIN)/python -m pip install --quiet --constraint constraints.txt --only-binary :all: triton
	touch $(TRITON)

test: setup $(TRITON)
	$(BIN)/python -m pytest -n 2 --dist loadfile

slow: setup $(TRITON)
	$(BIN)/python -m pytest -m slow

check: setup
	$(BIN)/ruff format --check polybit tests benchmarks examples recipes packaging
	$(BIN)/ruff check polybit tests benchmarks examples recipes packaging
	$(BIN)/mypy

# The site of the documentation, in build/site; any warning is an error. tests/docs/test_site.py does the same.
docs: setup
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

clean:
	rm -rf demo build dist .pytest_cache .mypy_cache .ruff_cache
