# `make demo` and `make test` need nothing but Python 3.10+ with venv, and a network for pip.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile -c constraints.txt
LAUNCH := $(BIN)/accelerate launch --quiet --config_file launchers/accelerate/one_process.yaml launchers/train.py
DEMO := runs/demo
ADAPTERS := ["control=$(DEMO)/control/stage2/adapter.safetensors", \
             "action-aware=$(DEMO)/action-aware/stage2/adapter.safetensors"]

# OpenMP threads that spin while they wait take the core from the decoding worker.
export OMP_WAIT_POLICY ?= PASSIVE
export TOKENIZERS_PARALLELISM ?= false

.PHONY: demo test test-slow lint wheel clean

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) -e .
	touch $@

$(VENV)/.installed-test: $(VENV)/.installed
	$(PIP) -e ".[test,lint]"
	touch $@

# The whole job on the embedded default: drawn scenes -> shards -> two-stage training -> re-ranked retrieval.
demo: $(VENV)/.installed
	$(BIN)/python tools/scenes/make_scenes.py --out data/demo/scenes
	$(BIN)/python tools/make_shards.py --captions data/demo/scenes/dataset.json --images data/demo/scenes/images \
	    --knowledge data/demo/scenes/knowledge.jsonl --knowledge_provenance data/demo/scenes/knowledge_provenance.json \
	    --out data/demo/drawn-scenes
	$(LAUNCH) --config launchers/configs/scenes.yaml --out $(DEMO)/control --conditioning none --prompt.knowledge none
	$(LAUNCH) --config launchers/configs/scenes.yaml --out $(DEMO)/action-aware
	$(BIN)/python launchers/evaluate.py --config launchers/configs/scenes.yaml --split test --out $(DEMO)/results.json \
	    --gallery $(DEMO)/retrievals.png --adapters '$(ADAPTERS)'
	$(BIN)/python tools/scenes/twins.py --config launchers/configs/scenes.yaml --dataset data/demo/scenes/dataset.json \
	    --split test --out $(DEMO)/twins.json --adapters '$(ADAPTERS)'

test: $(VENV)/.installed-test
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -m "not slow"

test-slow: $(VENV)/.installed-test
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -m slow

lint: $(VENV)/.installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

wheel: $(VENV)/.installed-test
	$(BIN)/python -m build --wheel

clean:
	rm -rf runs/demo data/demo build dist *.egg-info
