# Every target makes its own virtual environment; only Python >= 3.10 is needed.
PYTHON ?= python3
VENV := .venv
OLDEST := .venv-oldest
DEMO_FLAGS ?=

.PHONY: demo test test-oldest lint types bench clean

demo: $(VENV)/installed-demo
	$(VENV)/bin/mcl-kernels demo $(DEMO_FLAGS)

test: $(VENV)/installed-test
	$(VENV)/bin/python -m pytest -n logical

# The lower bounds of pyproject.toml: what `pip install mcl-kernels` may meet.
test-oldest: $(OLDEST)/installed
	$(OLDEST)/bin/python -m pytest -n logical --ignore tests/test_package.py --ignore tests/test_readme.py

lint: $(VENV)/installed-test
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

types: $(VENV)/installed-test
	$(VENV)/bin/mypy

# Time and memory against batch size: benchmarks/batch_size.csv, and the README's figure drawn from it.
bench: $(VENV)/installed-test
	$(VENV)/bin/python -m benchmarks.batch_size

$(VENV)/installed-%: pyproject.toml constraints.txt
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --constraint constraints.txt --editable '.[$*]'
	touch $@ $(if $(filter test,$*),$(VENV)/installed-demo)  # the test extra holds the demo's

$(OLDEST)/installed: pyproject.toml constraints-oldest.txt
	test -x $(OLDEST)/bin/python || $(PYTHON) -m venv $(OLDEST)
	$(OLDEST)/bin/python -m pip install --quiet --constraint constraints-oldest.txt --editable '.[test]'
	touch $@

clean:
	rm -rf $(VENV) $(OLDEST) build dist *.egg-info
