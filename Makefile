# Two commands matter: `make demo` and `make test`. Each builds .venv first if it has to.
#
# PYTHON: the interpreter to build .venv from (3.11 or newer).
# SEEDS:  how many `make simulate` runs.
# RAY:    `make test RAY=no` leaves out the tests that start a real Ray cluster.

PYTHON ?= $(shell command -v python3.11 || command -v python3)
RAY    ?= yes
SEEDS  ?= 500
BIN    := .venv/bin
READY  := .venv/.ready
EXTRAS := data,metrics,test,lint,examples
BENCH  := .venv/.ready-bench
SAY    := @printf '\033[1m== %s\033[0m\n'

.DEFAULT_GOAL := help
.PHONY: help setup demo semantics test lint types imports deps core unit ray-tests simulate seeds planted format bench bench-full bench-check clean

help:  ## Show this list
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-11s %s\n", $$1, $$2}'

setup: $(READY)  ## Build .venv with everything in it (the other targets do it by themselves)

# The stamp is older than pyproject.toml exactly when the dependencies may have changed.
$(READY): pyproject.toml
	$(SAY) "setting up .venv with $(PYTHON)"
	@$(PYTHON) -c 'import sys; sys.exit("raftlog needs Python 3.11 or newer, this is " + sys.version.split()[0]) if sys.version_info < (3, 11) else 0'
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@test -x $(BIN)/uv || $(BIN)/python -m pip install --quiet --disable-pip-version-check uv
	@VIRTUAL_ENV="$(CURDIR)/.venv" $(BIN)/uv pip install --quiet -e '.[$(EXTRAS)]'
	@touch $@

demo: $(READY)  ## 336,776 flights through a replicated topic on Ray, with a leader killed half way
	$(SAY) "demo: examples/flights.py"
	@$(BIN)/python examples/flights.py $(ARGS)

semantics: $(READY)  ## At most, at least, exactly once side by side on Ray, with everything being killed
	$(SAY) "semantics: examples/exactly_once.py"
	@$(BIN)/python examples/exactly_once.py $(ARGS)

test: lint types imports deps core unit ray-tests  ## Everything that must pass: style, types, layers, dependencies, tests

lint: $(READY)  ## Format and style (ruff)
	$(SAY) "ruff: format and lint"
	@$(BIN)/ruff format --check --quiet .
	@$(BIN)/ruff check --quiet .

types: $(READY)  ## Types (mypy --strict)
	$(SAY) "mypy --strict"
	@$(BIN)/mypy --no-error-summary

imports: $(READY)  ## Which package may import which (import-linter)
	$(SAY) "import-linter: the layers"
	@PYTHONWARNINGS=ignore $(BIN)/lint-imports --no-cache > .venv/lint-imports.txt || { cat .venv/lint-imports.txt; exit 1; }

deps: $(READY)  ## Declared dependencies are the imported ones (deptry)
	$(SAY) "deptry: declared against imported dependencies"
	@$(BIN)/deptry . > .venv/deptry.txt 2>&1 || { cat .venv/deptry.txt; exit 1; }

core: $(READY)  ## The Raft core's own tests, which must take its every branch
	$(SAY) "pytest and coverage: the Raft core, every branch"
	@$(BIN)/coverage run -m pytest -q tests/raft -m "not walk"
	@$(BIN)/coverage report > .venv/coverage.txt || { cat .venv/coverage.txt; exit 1; }
	$(SAY) "pytest: random walks of the Raft core"
	@$(BIN)/python -m pytest -q tests/raft -m walk

unit: $(READY)  ## The other tests without Ray
	$(SAY) "pytest: everything else without Ray"
	@$(BIN)/python -m pytest -q -m "not ray" --ignore=tests/raft

ray-tests: $(READY)  ## The tests on a real Ray cluster
ifeq ($(RAY),yes)
	$(SAY) "pytest: on a real Ray cluster"
	@$(BIN)/python -m pytest -q -m ray || test $$? -eq 5  # 5: none were collected
endif

simulate: $(READY)  ## 500 simulated clusters under faults (SEEDS=, ARGS=), and every planted bug must be found
	@$(MAKE) --no-print-directory --jobs=2 --output-sync=target seeds planted

seeds: $(READY)
	$(SAY) "simulation: $(SEEDS) seeds"
	@nice -n 10 $(BIN)/python -m raftlog.testing.simulate --seeds $(SEEDS) $(ARGS)

planted: $(READY)
	$(SAY) "simulation: planted bugs"
	@nice -n 10 $(BIN)/python -m raftlog.testing.simulate --mutations

format: $(READY)  ## Format the code and fix what ruff can fix
	$(SAY) "ruff: format and fix"
	@$(BIN)/ruff check --quiet --fix-only .
	@$(BIN)/ruff format --quiet .

$(BENCH): $(READY)
	$(SAY) "what is measured beside raftlog"
	@VIRTUAL_ENV="$(CURDIR)/.venv" $(BIN)/uv pip install --quiet -e '.[bench]'
	@touch $@

bench: $(BENCH)  ## Side by side with NATS, Kafka and Ray, some minutes; writes docs/PERFORMANCE.md
	$(SAY) "bench: transactions"
	@$(BIN)/python bench/transactions.py --rounds 3
	$(SAY) "bench: side by side"
	@$(BIN)/python bench/run.py $(ARGS)

bench-full: $(BENCH)  ## The same with longer turns and more rounds; failover; nodes that come and go
	$(SAY) "bench: transactions"
	@$(BIN)/python bench/transactions.py
	$(SAY) "bench: failover"
	@$(BIN)/python bench/failover.py
	$(SAY) "bench: nodes come and go"
	@$(BIN)/python bench/elastic.py
	$(SAY) "bench: side by side, in full"
	@$(BIN)/python bench/run.py --size full $(ARGS)

bench-check: $(BENCH)  ## Fails if raftlog has lost ground against the floor since the kept results
	$(SAY) "bench: against the kept results"
	@$(BIN)/python bench/regress.py $(ARGS)

clean:  ## Remove .venv and every cache
	rm -rf .venv build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
