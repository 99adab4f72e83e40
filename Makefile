# Both main targets do all the set-up: `make demo` and `make test`. A second run skips what is done.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
MODEL := .demo/SmolLM2-135M-Instruct/ready

.PHONY: demo serve test test-all test-fast gpu-test gpu-pack bench-memory soak lint clean

demo: $(INSTALLED)
	$(BIN)/sglang-metasoft demo

serve: $(MODEL)
	$(BIN)/sglang-metasoft serve-demo

test: $(MODEL)
	$(BIN)/python -m pytest -m "not slow"

test-all: $(MODEL)
	$(BIN)/python -m pip install --disable-pip-version-check -q sglang-router==0.3.2
	$(BIN)/python -m pytest

test-fast: $(INSTALLED)
	$(BIN)/python -m pytest -m "not server"

bench-memory: $(MODEL)
	$(BIN)/python benchmarks/memory.py --plot docs/memory.png

gpu-test: $(MODEL)
	$(BIN)/python -m pytest tests/gpu -s

gpu-pack: $(INSTALLED)
	$(BIN)/python tests/gpu/pack.py .gpu

soak: $(MODEL)
	$(BIN)/python tests/soak.py --seconds 600 --faults

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

$(MODEL): $(INSTALLED)
	$(BIN)/sglang-metasoft demo-model

$(INSTALLED): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check -q -e '.[demo,test,dev]'
	touch $@

clean:
	rm -rf $(VENV) .demo build dist *.egg-info
