# Each target creates .venv and installs what it needs; `make PYTHON=python3.12 test` picks another interpreter.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP_INSTALL := $(BIN)/python -m pip install -q -c constraints.txt

.PHONY: demo test test-all check docs examples format step-time train pays clean

demo: $(VENV)/.benchmarks
	$(BIN)/python -m benchmarks.demo

# One thread per worker: with more they wait for one another on two cores.
test: $(VENV)/.test
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 -m "not slow"

test-all: $(VENV)/.test
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2

check: $(VENV)/.check docs
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The site, into build/site; a broken link or an unknown name fails.
docs: $(VENV)/.docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

examples: $(VENV)/.examples
	for name in classify uncertainty laplace_posterior spectrum poisson_1d; do $(BIN)/python -m examples.$$name || exit 1; done

format: $(VENV)/.check
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

step-time: $(VENV)/.benchmarks
	$(BIN)/python -m benchmarks.step_time

train: $(VENV)/.benchmarks
	$(BIN)/python -m benchmarks.train

# What is not in docs/results/pays/ yet; SOAP is another package.
pays: $(VENV)/.benchmarks
	$(PIP_INSTALL) --no-deps pytorch-optimizer
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.pays

$(VENV)/.created:
	$(PYTHON) -m venv $(VENV)
	touch $@

# torch first and alone: pip then keeps the pinned build when the other packages ask for "torch".
$(VENV)/.torch: $(VENV)/.created constraints.txt
	$(BIN)/python -m pip install -q "$$(grep '^torch==' constraints.txt)"
	touch $@

$(VENV)/.test: $(VENV)/.torch pyproject.toml
	$(PIP_INSTALL) -e ".[test,benchmarks,examples,integrations]"
	$(PIP_INSTALL) --no-deps timm  # it asks for torchvision, which brings another torch; the tests do without
	touch $@

$(VENV)/.benchmarks: $(VENV)/.torch pyproject.toml
	$(PIP_INSTALL) -e ".[benchmarks]"
	touch $@

$(VENV)/.examples: $(VENV)/.torch pyproject.toml
	$(PIP_INSTALL) -e ".[examples]"
	touch $@

$(VENV)/.docs: $(VENV)/.torch pyproject.toml
	$(PIP_INSTALL) -e ".[docs]"
	touch $@

$(VENV)/.check: $(VENV)/.torch pyproject.toml
	$(PIP_INSTALL) -e ".[check]"
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info
