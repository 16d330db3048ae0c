# make demo   sets up and trains the tiny model, with the live table
# make test   sets up and passes the tests
# make lab    opens JupyterLab on the notebooks
# make docs   renders the notebooks into _docs/
# make bench  times training beside TRL on this machine
# make check  drift, lint, types
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
ARGS   ?=

.PHONY: demo test lab docs bench check readme clean
.DEFAULT_GOAL := demo

demo: $(VENV)/core
	@$(BIN)/python -m dpo_lab.train behavior_if_log_dir_exists=raise $(ARGS)

test: $(VENV)/dev
	@OMP_NUM_THREADS=1 $(BIN)/nbdev-test --n-workers 2 --do-print
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder $(ARGS)

lab: $(VENV)/dev
	@$(BIN)/dpo_lab lab $(ARGS)

docs: $(VENV)/dev
	@$(BIN)/python .ci/docs.py

bench: $(VENV)/dev
	@$(BIN)/python nbs/benchmarks/throughput.py $(ARGS)

# what a change has to pass besides the tests: nothing drifts, nothing lints, types agree
check: $(VENV)/dev
	@$(BIN)/nbdev-export && $(BIN)/nbdev-clean && git diff --exit-code --stat -- nbs dpo_lab
	@$(BIN)/ruff check nbs dpo_lab tests setup.py
	@$(BIN)/mypy dpo_lab

readme: $(VENV)/dev
	@$(BIN)/python .ci/readme.py

$(VENV)/python:
	@command -v $(PYTHON) >/dev/null || { echo "There is no $(PYTHON) here: install Python 3.10 or newer, or say 'make PYTHON=/path/to/python'."; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { echo "dpo_lab needs Python 3.10 or newer, and this is $$($(PYTHON) -V). Say 'make PYTHON=/path/to/python'."; exit 1; }
	@free=$$(df -Pk . | awk 'NR==2 {print int($$4/1000000)}'); [ $$free -ge 4 ] || { echo "Setting up takes 4 GB of disk, and $$free GB are free here."; exit 1; }
	@echo "Making an environment in $(VENV), once." && $(PYTHON) -m venv $(VENV) && touch $@

$(VENV)/core: settings.ini constraints.txt setup.py | $(VENV)/python
	@echo "Installing dpo_lab, once: a minute or two." && $(BIN)/python -m pip install -q -c constraints.txt -e . && touch $@

$(VENV)/dev: $(VENV)/core
	@echo "Installing what tests and notebooks need, once." && $(BIN)/python -m pip install -q -c constraints.txt -e '.[dev]' && touch $@

clean:
	@rm -rf $(VENV) build dist *.egg-info _docs _proc
