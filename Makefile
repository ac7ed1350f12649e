# make quickstart   everything from nothing: environment, then the default run
# make test         the same environment, then the tests
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.made
TORCH := $(shell grep -E '^torch==' constraints.txt)
PYTEST_ARGS ?=

.PHONY: quickstart test lint types env clean

quickstart: env
	$(BIN)/python launcher/run.py --ds ds_configs/zero3.json
	@echo "commands that begin with python want the environment: . $(BIN)/activate"

test: $(VENV)/.ops
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/python -m pytest $(PYTEST_ARGS)

lint: env
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports

types: env
	$(BIN)/mypy

env: $(STAMP)

# torch comes first and alone: with its version exact, pip takes the build that suits the machine.
$(STAMP): pyproject.toml constraints.txt
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "Python 3.11 or newer is needed; name one: make PYTHON=/path/to/python3.11" >&2; exit 1; }
	test -x $(BIN)/python || "$(PYTHON)" -m venv $(VENV)
	$(BIN)/python -m pip install -q -c constraints.txt $(TORCH)
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[dev]'
	@touch $@

# The tests offload too; left to them, both ranks of one and the nodes of another would wait for a compiler, and one that
# is ended while it compiles would leave a lock behind.
$(VENV)/.ops: $(STAMP)
	@echo "compiling DeepSpeed's ops for CPUs (once, some minutes)"
	@$(BIN)/python -c 'from launcher.train import ops; \
		print(ops.build_all(["CPUAdamBuilder", "PinMemoryBuilder", "AsyncIOBuilder"], "cpu", 900))' \
		> $(VENV)/compile.log 2>&1 || tail -n 3 $(VENV)/compile.log
	@touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .import_linter_cache
	find launcher tests -name __pycache__ -type d -prune -exec rm -rf {} +
