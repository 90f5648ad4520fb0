"""Engines by name; each is imported only when it is asked for."""

from __future__ import annotations

from typing import Any, Literal

from amp.generation.engines.base import Engine

EngineName = Literal["rules", "transformers", "openai", "vllm"]


def make_engine(name: EngineName, options: dict[str, Any]) -> Engine | None:
    """Loads the model or reaches for the server; None for ``rules``, which ask no model.

    Raises:
        EngineError: it can't be loaded.
    """
    if name == "transformers":
        from amp.generation.engines.transformers_engine import TransformersEngine

        return TransformersEngine(**options)
    if name == "openai":
        from amp.generation.engines.openai_engine import OpenAIEngine

        return OpenAIEngine(**options)
    if name == "vllm":
        from amp.generation.engines.vllm_engine import VLLMEngine

        return VLLMEngine(**options)
    return None
