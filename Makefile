# Every target sets up what it needs and is quick the second time. `make` alone lists them.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
BENCH_VENV := .venv-bench
# Where `make tools` puts real opa, nats-server and promtool, and where tests and `agentweave up` look for them.
export AGENTWEAVE_TOOLS ?= $(HOME)/.cache/agentweave/tools
# Tests and the demo start hundreds of processes of Python, twice as quick where compiled modules may be kept.
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help
.PHONY: help demo test test-needs test-slow chaos attacks mutants bench bench-tasks bench-large bench-memory bench-memory-tasks lint tools tools-spire clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-18s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: $(VENV)/.installed ## start the example stack, carry an order through it, show what is refused (HOLD=1 keeps it up, with its console)
	@$(BIN)/python -m workers.ecommerce.demo $(if $(HOLD),--hold)

# Three at once, a file to each: they wait for a third of their time, so that two leave two processors idle.
test: $(VENV)/.installed test-needs ## run the tests, without the slow ones (the first time builds what they need, some minutes)
	@$(BIN)/python -m tests.suite -q -m "not slow" -n 3 --dist loadfile

test-slow: $(VENV)/.installed test-needs ## run the slow tests
	@$(BIN)/python -m tests.suite -q -m slow -n 2 --dist loadfile

# What can't be had is said, and the tests that need it are skipped.
test-needs:
	@.ci/tools "$(AGENTWEAVE_TOOLS)" || echo "Not all tools could be built. Tests that need the others are skipped."
	@.ci/chromium

TASKS ?= 10000
DURATION ?= 900
chaos: $(VENV)/.installed ## tasks while workers, broker, control role and client are killed (TASKS=10000 DURATION=900: seconds at most)
	@$(BIN)/python -m tests.chaos --tasks $(TASKS) --duration $(DURATION)

attacks: $(VENV)/.installed ## write the table of attacks in docs/security.md from the tests' own marks
	@$(BIN)/python -m tests.security.attack_table

mutants: $(VENV)/.installed test-needs ## take out each check in turn and see which attack notices (8 minutes; WRITE=--write updates the docs)
	@$(BIN)/python -m tests.security.mutants $(WRITE)

bench: $(BENCH_VENV)/.installed ## compare with raw nats-py, FastStream, a2a-sdk and Taskiq (8 minutes; WRITE=--write updates the docs)
	@$(BENCH_VENV)/bin/python -m benchmarks run $(WRITE)

bench-tasks: $(BENCH_VENV)/.installed ## the part of it about durable tasks alone (3 minutes)
	@$(BENCH_VENV)/bin/python -m benchmarks tasks $(WRITE)

QUEUED ?= 1000000
bench-large: $(BENCH_VENV)/.installed ## whether a long queue is as quick as a short one (QUEUED=1000000: 10 minutes)
	@$(BENCH_VENV)/bin/python -m benchmarks large --queued $(QUEUED) $(WRITE)

bench-memory: $(BENCH_VENV)/.installed ## a worker's memory over a million calls (10 minutes)
	@$(BENCH_VENV)/bin/python -m benchmarks memory $(WRITE)

bench-memory-tasks: TASKS = 100000
bench-memory-tasks: $(BENCH_VENV)/.installed ## a worker's memory over durable tasks (TASKS=100000: 3 minutes)
	@$(BENCH_VENV)/bin/python -m benchmarks memory-tasks --tasks $(TASKS) $(WRITE)

lint: $(VENV)/.installed ## check style, types and the layers
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports

tools: ## build the pinned opa and nats-server with Go, where there is Go; fetch promtool, where there is apt-get
	@.ci/tools "$(AGENTWEAVE_TOOLS)"

tools-spire: ## build the pinned SPIRE server and agent, for the tests that want them (7 minutes)
	@.ci/tools-spire "$(AGENTWEAVE_TOOLS)"

clean: ## remove the virtual environment and caches; the state of stacks (.agentweave) stays
	rm -rf $(VENV) $(BENCH_VENV) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(VENV)/.installed: pyproject.toml constraints.txt constraints-bench.txt .ci/venv
	@.ci/venv "$(PYTHON)" "$(VENV)"
	@touch $@

$(BENCH_VENV)/.installed: pyproject.toml constraints.txt constraints-bench.txt .ci/venv
	@.ci/venv "$(PYTHON)" "$(BENCH_VENV)" embedded,bench
	@touch $@
