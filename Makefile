# make demo   set up and run the main job on a sample bag (no ROS needed)
# make test   set up and run linter and tests (those of the ROS node too where ROS is sourced)

PYTHON ?= python3
TORCH ?= torch==2.13.0
# where PyTorch publishes its CPU builds; only asked if pip's own index has none
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu

VENV := .venv
BIN := $(VENV)/bin
DEMO := demo

.PHONY: demo test lint clean

# ROS's PYTHONPATH brings packages and pytest plugins that do not belong in this environment
demo test lint: export PYTHONPATH :=

$(VENV)/.installed: setup.py pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
		{ echo "Python 3.10 or later is needed: make PYTHON=/path/to/python3 ..."; exit 1; }
	@echo "Setting up $(VENV) (the first time takes a few minutes)"
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/pip install -q "$(TORCH)+cpu" 2>/dev/null \
		|| $(BIN)/pip install -q --index-url $(TORCH_INDEX) "$(TORCH)" \
		|| $(BIN)/pip install -q "$(TORCH)"
	@$(BIN)/pip install -q -e '.[test]'
	@touch $@

$(DEMO)/drive: | $(VENV)/.installed
	@echo "Rendering a sample drive"
	@mkdir -p $(DEMO)
	@$(BIN)/python -m scfeat_training.synthetic bag $@

demo: $(VENV)/.installed $(DEMO)/drive
	@$(BIN)/scfeat bag $(DEMO)/drive -o $(DEMO)/result --video --overwrite

lint: $(VENV)/.installed
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .

test: lint
	@OMP_WAIT_POLICY=passive $(BIN)/python -m pytest

clean:
	rm -rf $(VENV) .venv-ros $(DEMO)
