# make demo     the whole product on a made-up CT, from a bare Python >= 3.11, without torch
# make test     install everything and run the tests
# The CPU build of torch is smaller: PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu make install

SHELL := /bin/bash
# the first interpreter that starts and is new enough
PYTHON ?= $(shell for p in python3.11 python3 python3.12 python3.13; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
VENV := .venv
RIVAL := .venv-rival
BIN := $(VENV)/bin
EXTRAS := export,train,ort,cuda,trtcheck,triton,int8,dicom,report,bench,test

.PHONY: install demo test coverage bench rival lint types clean
.DELETE_ON_ERROR:

install: $(VENV)/.installed

$(BIN)/python:
	@test -n "$(PYTHON)" || { echo "segrt needs Python 3.11 or newer; name one with: make PYTHON=/path/to/python3" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

# torch first and pinned: otherwise a dependent may pull a newer build of several GB
$(VENV)/.installed: setup.py | $(BIN)/python
	$(BIN)/python -m pip install --quiet torch==2.13.0
	$(BIN)/python -m pip install --quiet -e ".[$(EXTRAS)]"
	$(BIN)/python -m pip install --quiet --no-deps nvidia-pytriton==0.7.0  # a real tritonserver; what it asks for would lower NumPy
	touch $@

# the demo needs the torch-free core and matplotlib; an environment that already has them is used as it is
demo: | $(BIN)/python
	@$(BIN)/python -c "import segrt, openvino, numba, cc3d, matplotlib" 2>/dev/null && test -x $(BIN)/segrt-predict \
		|| $(BIN)/python -m pip install --quiet -e ".[report]"
	$(BIN)/python examples/demo/run.py

test: install
	OMP_WAIT_POLICY=PASSIVE $(BIN)/python -m pytest -p tests.shared_guard -n 2 --dist loadfile --no-loadscope-reorder $(PYTEST_ARGS)

coverage: install
	$(BIN)/python -m pytest --cov=segrt --cov-report=term-missing:skip-covered --cov-fail-under=95 $(PYTEST_ARGS)

bench: install rival
	@set -e; for name in kernels files engine export precision loader frames serve; do echo "== $$name"; $(BIN)/python benchmarks/$$name.py; done
	$(BIN)/python benchmarks/startup.py
	$(BIN)/python benchmarks/same_labels.py
	$(BIN)/python benchmarks/whole_job.py --rival $(RIVAL)/bin
	$(BIN)/python benchmarks/step_time.py --rival $(RIVAL)/bin

# nnU-Net itself, in an environment of its own; its dependencies pull a newer torch, which is put right afterwards
rival: $(RIVAL)/.installed

$(RIVAL)/.installed:
	$(PYTHON) -m venv $(RIVAL)
	$(RIVAL)/bin/python -m pip install --quiet torch==2.13.0
	$(RIVAL)/bin/python -m pip install --quiet nnunetv2==2.8.1
	$(RIVAL)/bin/python -m pip install --quiet --force-reinstall --no-deps torch==2.13.0
	touch $@

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: install
	$(BIN)/mypy

clean:
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .coverage coverage.xml demo_out
