# Both main targets do all the set-up: `make demo` and `make test`. A second run skips what is done.
# `make test-0.5.17` tests with that SGLang, in an environment of its own; so does `make test-0.5.17-identity`, in part.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
SGLANG := 0.5.23
OTHERS := 0.5.17
MODEL := .demo/SmolLM2-135M-Instruct/ready

# Two files of tests at a time, each on one thread, where no GPU is shared; `make test WORKERS=0` takes one after the other.
WORKERS ?= $(if $(shell command -v nvidia-smi),0,2)
# Files in their order, servers before the unit tests: the last ones are short, so that both end together.
TWO_AT_A_TIME := -n $(WORKERS) --dist loadfile --no-loadscope-reorder

.PHONY: demo serve tools test test-all test-fast gpu-test gpu-pack bench-memory soak fuzz eval lint docs clean
.PHONY: $(OTHERS:%=test-%) $(OTHERS:%=test-%-identity)

demo: $(INSTALLED)
	$(BIN)/sglang-metasoft demo

serve: $(MODEL)
	$(BIN)/sglang-metasoft serve-demo

test: $(MODEL) tools
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(TWO_AT_A_TIME) -m "not slow"

test-all: $(MODEL) tools
	$(BIN)/python -m pip install --disable-pip-version-check -q sglang-router==0.3.2
	$(BIN)/python -m pytest

# For the tests of `sglang-metasoft inspect` (Chromium) and of the alert rules (promtool); where they cannot be installed
# those tests are skipped and say so, or fail if CI is set.
tools:
	@{ command -v chromium && command -v promtool; } > /dev/null || { test "$$(id -u)" = 0 && command -v apt-get > /dev/null \
		&& apt-get update -qq && RUNLEVEL=1 apt-get install -y -qq --no-install-recommends chromium prometheus; } \
		|| echo "Chromium or promtool is not installed: apt-get install chromium prometheus, as root"

test-fast: $(INSTALLED)
	$(BIN)/python -m pytest -m "not server"

$(OTHERS:%=test-%): test-%: .venv-%/.installed
	OMP_NUM_THREADS=1 .venv-$*/bin/python -m pytest $(TWO_AT_A_TIME) -m "not slow"

$(OTHERS:%=test-%-identity): test-%-identity: .venv-%/.installed
	OMP_NUM_THREADS=1 .venv-$*/bin/python -m pytest -m "not slow" tests/contract tests/server/test_identity.py

bench-memory: $(MODEL)
	$(BIN)/python benchmarks/memory.py --output build/memory.json --plot build/memory.png

gpu-test: $(MODEL)
	$(BIN)/python -m pytest tests/gpu tests/kernels -s

gpu-pack: $(INSTALLED)
	$(BIN)/python tests/gpu/pack.py .gpu

# Quality of untrained and field methods on the demo model, in process: RULER at 2K tokens, a few cases.
eval: $(MODEL)
	$(BIN)/sglang-metasoft eval-hf --model $(dir $(MODEL)) --methods metasoft snapkv oracle --tasks ruler \
	  --modes inside after --cases 5 --output .eval-results/ruler.jsonl
	$(BIN)/sglang-metasoft eval-report .eval-results/ruler.jsonl --output .eval-results

# The environment of `python -m sglang_metasoft.eval.kvpress_runner`: the peers' own code.
.venv-kvpress/.installed: pyproject.toml
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/python -m pip install --disable-pip-version-check -q kvpress==0.5.5 'transformers<5.3' torch==2.13.0 \
	  wonderwords==3.0.1 rouge==1.0.1
	touch $@

soak: $(MODEL)
	$(BIN)/python tests/soak.py --seconds 600 --faults

# Random orders of events in a scheduler without a model, then random requests against plain SGLang as the oracle. A new
# seed each time; SEED=, SECONDS= (of the latter) and VARIANT= say otherwise.
fuzz: $(MODEL)
	seed=$(or $(SEED),$$(shuf -i 0-999999999 -n 1)); export OMP_NUM_THREADS=1; \
	  METASOFT_FUZZ_SEED=$$seed $(BIN)/python -m pytest -q tests/unit/test_any_order_of_events.py && \
	  $(BIN)/python -m tests.differential.fuzz --seed $$seed $(if $(SECONDS),--seconds $(SECONDS)) \
	  $(if $(VARIANT),--variant $(VARIANT))

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: $(INSTALLED)
	$(BIN)/mkdocs build --strict

$(MODEL): $(INSTALLED)
	$(BIN)/sglang-metasoft demo-model

$(INSTALLED): pyproject.toml
	$(call install,$(SGLANG))

$(OTHERS:%=.venv-%/.installed): .venv-%/.installed: pyproject.toml
	$(call install,$*)

define install
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/python -m pip install --disable-pip-version-check -q -e '.[demo,eval,train,test,dev]' sglang==$(1)
	touch $@
endef

clean:
	rm -rf $(VENV) .venv-* .demo .eval-data .eval-results .train-data .train-run build dist *.egg-info
