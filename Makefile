# make demo   set up and run the main job on a sample bag (no ROS needed)
# make test   set up and run linter and tests (those of the ROS node too where ROS is sourced)

PYTHON ?= python3
TORCH ?= torch==2.13.0
# where PyTorch publishes its CPU builds; only asked if pip's own index has none
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu

VENV := .venv
BIN := $(VENV)/bin
DEMO := demo

# The environment for the node: the Python, numpy and OpenCV that ROS and cv_bridge were built with
ROS_PYTHON ?= /usr/bin/python3
ROS_VENV := .venv-ros
HAS_ROS := $(shell $(ROS_PYTHON) -c 'import rclpy' 2>/dev/null && echo yes)

# An environment is bound to its folder and its Python: in one that was moved no program starts, and
# one that was copied runs the code of the original. These are made anew.
made_for = $(CURDIR) $$($(1)/bin/python -c 'import sys; print(*sys.version_info[:2])' 2>&1)
stale = $(shell [ ! -s $(1)/.installed ] || [ "$$(cat $(1)/.installed)" = "$(made_for)" ] || echo stale)

# $(call install_torch,DIRECTORY OF PIP)
define install_torch
	@$(1)/pip install -q "$(TORCH)+cpu" 2>/dev/null \
		|| $(1)/pip install -q --index-url $(TORCH_INDEX) "$(TORCH)" \
		|| $(1)/pip install -q "$(TORCH)"
endef

.PHONY: demo test lint test-general test-ros clean stale

# ROS's PYTHONPATH brings packages and pytest plugins that do not belong in this environment
demo lint test-general $(VENV)/.installed $(DEMO)/drive: export PYTHONPATH :=

$(VENV)/.installed: setup.py $(call stale,$(VENV))
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
		{ echo "Python 3.10 or later is needed: make PYTHON=/path/to/python3 ..."; exit 1; }
	@echo "Setting up $(VENV) (the first time takes a few minutes)"
	@$(PYTHON) -m venv $(if $(call stale,$(VENV)),--clear) $(VENV)
	$(call install_torch,$(BIN))
	@$(BIN)/pip install -q -e '.[test]'
	@echo "$(call made_for,$(VENV))" > $@

$(DEMO)/drive: | $(VENV)/.installed
	@echo "Rendering a sample drive"
	@mkdir -p $(DEMO)
	@$(BIN)/python -m scfeat_training.synthetic bag $@

demo: $(VENV)/.installed $(DEMO)/drive
	@$(BIN)/scfeat bag $(DEMO)/drive -o $(DEMO)/result --video --overwrite

lint: $(VENV)/.installed
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .

# the tests of the node are collected here too, to say that they are skipped and why
test-general: lint
	@OMP_WAIT_POLICY=passive $(BIN)/python -m pytest -rs $(if $(HAS_ROS),--ignore test/ros)

$(ROS_VENV)/.installed: setup.py $(call stale,$(ROS_VENV))
	@echo "Setting up $(ROS_VENV) for ROS $(ROS_DISTRO)"
	@$(ROS_PYTHON) -m venv --system-site-packages $(if $(call stale,$(ROS_VENV)),--clear) $(ROS_VENV)
	$(call install_torch,$(ROS_VENV)/bin)
	@numpy=$$($(ROS_PYTHON) -c 'import numpy; print(numpy.__version__.split(".")[0])') && \
		$(ROS_VENV)/bin/pip install -q "numpy<$$((numpy + 1))" 'setuptools<80' safetensors rosbags \
		tqdm hypothesis pytest
	@# without their dependencies, which would put PyPI's OpenCV over the one of cv_bridge
	@$(ROS_VENV)/bin/pip install -q --no-deps rosbags-image
	@$(ROS_VENV)/bin/pip install -q --no-deps --no-build-isolation -e .
	@echo "$(call made_for,$(ROS_VENV))" > $@

# launch_testing's pytest plugins clash with recent pytest, hence no plugins
test-ros: $(ROS_VENV)/.installed
	@PYTEST_DISABLE_PLUGIN_AUTOLOAD=1 OMP_WAIT_POLICY=passive \
		$(ROS_VENV)/bin/python -m pytest -rs -p no:cacheprovider test/ros

test: test-general $(if $(HAS_ROS),test-ros)

clean:
	rm -rf $(VENV) $(ROS_VENV) $(DEMO)
