# `make demo` and `make test` need python3, make and git; everything else they install into .venv.
#
#   make test PYTHON=python3.12              another Python (3.11, 3.12 or 3.13)
#   make test TORCH="torch==2.13.0 ..."      another build of torch: what follows is handed to `pip install`,
#                                            so the options that pytorch.org names for CPU or CUDA go here.
#                                            Read when .venv is made; `make clean` first to change it later.
#   make test ARGS="-k evidence -x"          options for pytest
#   make fuzz SEEDS=0:10000                  other random nets
#   make bench PEERS="--laplace-python ..."  with our peers; examples/benchmarks/grams.py says how
#   make bench WIDE_PEER="--peer-python ..." with neural-tangents; examples/benchmarks/infinite_width.py says how
#   make bench BAYESOPT_PEER="--peer-python ..." with laplace-bayesopt; contenders/laplace_bayesopt.txt is its environment

PYTHON ?= python3
TORCH ?= torch==2.13.0
ARGS ?=
PEERS ?=
WIDE_PEER ?=
BAYESOPT_PEER ?=
SEEDS ?= 0:640

VENV := .venv
ifeq ($(OS),Windows_NT)
BIN := $(VENV)/Scripts
else
BIN := $(VENV)/bin
endif
PIP := $(BIN)/python -m pip
READY := $(VENV)/.ready

.DEFAULT_GOAL := help
.PHONY: help demo test fuzz bench lint format clean

help:
	@echo "make demo     turn two trained nets into GPs on real data (examples/quickstart.py)"
	@echo "make test     ruff and pytest"
	@echo "make fuzz     Grams of 640 random nets against per-example autodiff (SEEDS=0:640)"
	@echo "make bench    time and memory of examples/benchmarks, for docs/benchmarks.md"
	@echo "make lint     ruff alone"
	@echo "make format   let ruff sort imports, mend what it can and lay out the code"
	@echo "make clean    remove .venv and everything else that was made here"

demo: $(READY)
	$(BIN)/python examples/quickstart.py

test: lint
	$(BIN)/python -m pytest $(ARGS)

fuzz: $(READY)
	$(BIN)/python -m pytest tests/test_fuzz_gram.py --seeds $(SEEDS) $(ARGS)

bench: $(READY)
	$(BIN)/python examples/benchmarks/grams.py $(PEERS)
	$(BIN)/python examples/benchmarks/wide_outputs.py
	$(BIN)/python examples/benchmarks/evidence_gradient.py
	$(BIN)/python examples/benchmarks/vogn_mnist.py
	$(BIN)/python examples/benchmarks/infinite_width.py $(WIDE_PEER)
	$(BIN)/python examples/benchmarks/bayesopt_speed.py $(BAYESOPT_PEER)

lint: $(READY)
	$(BIN)/python -m ruff check .

format: $(READY)
	$(BIN)/python -m ruff check --fix .
	$(BIN)/python -m ruff format .

# torch comes first and is then pinned to the very build that came, so that nothing installed later can replace it.
# The last line is reached only if all before it succeeded: a broken installation is repaired by the next run.
$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; (3, 11) <= v < (3, 14) or sys.exit("gpytorch_dnn2gp needs Python 3.11, 3.12 or 3.13, but $(PYTHON) is %d.%d. Choose another: make PYTHON=python3.12 ..." % v)'
	@echo "Installing torch, gpytorch and the other requirements into $(VENV) (once, some minutes)"
	@rm -f $@
	@$(PIP) --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV)
	@grep -v '^torch==' constraints.txt > $(VENV)/constraints.txt
	$(PIP) install --quiet -c $(VENV)/constraints.txt $(TORCH)
	@$(BIN)/python -c 'from importlib.metadata import version; print("torch==" + version("torch"))' >> $(VENV)/constraints.txt
	$(PIP) install --quiet -c $(VENV)/constraints.txt -e '.[dev,examples]'
	@touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache .hypothesis examples/output
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
