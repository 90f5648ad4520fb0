"""Engines that run language models. Each is one file, registered below; plugins register theirs in the same way.

Engines import their dependencies (torch, vLLM, ...) only when a model is loaded.
"""

from amp.generation.engines.base import Completion, Engine, EngineError, Message, Sampling, register_engine
from amp.generation.engines.openai_engine import OpenAIEngine
from amp.generation.engines.transformers_engine import TransformersEngine
from amp.generation.engines.vllm_engine import VLLMEngine

register_engine("transformers", TransformersEngine)
register_engine("openai", OpenAIEngine)
register_engine("vllm", VLLMEngine)

__all__ = ["Completion", "Engine", "EngineError", "Message", "Sampling", "register_engine"]
