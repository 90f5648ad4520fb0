"""Prompts rendered by the chat templates of several model families, and as plain text."""

import pytest

from amp.generation.engines.base import EngineError, Message
from amp.generation.engines.rendering import chat_parts, plain_prefix, plain_text

PREFIX = (Message("system", "Do it."), Message("user", "Caption: a"), Message("assistant", "none"))

# The families' published formats, shortened to the relevant parts.
LLAMA3 = (
    "{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n{{ m.content | trim }}<|eot_id|>"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
LLAMA2 = (
    "{% if messages[0].role == 'system' %}{% set s = messages[0].content %}{% set messages = messages[1:] %}{% endif %}"
    "{% for m in messages %}"
    "{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles') }}{% endif %}"
    "{% if m.role == 'user' %}"
    "[INST] {% if loop.first and s %}<<SYS>>\n{{ s }}\n<</SYS>>\n\n{% endif %}{{ m.content }} [/INST]"
    "{% else %} {{ m.content }} </s>{% endif %}{% endfor %}"
)
GEMMA = (
    "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for m in messages %}<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n{{ m.content | trim }}"
    "<end_of_turn>\n{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
QWEN3 = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% if enable_thinking is defined and not enable_thinking %}"
    "<think>\n\n</think>\n\n{% endif %}{% endif %}"
)


def tokenizer(template: str):
    """A tokenizer that can only render chat templates."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    made = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"x": 0}, unk_token="x")))
    made.chat_template = template
    return made


@pytest.mark.parametrize(
    "template, before, behind",
    [
        (
            LLAMA3,
            "<|start_header_id|>system<|end_header_id|>\n\nDo it.<|eot_id|>"
            "<|start_header_id|>user<|end_header_id|>\n\nCaption: a<|eot_id|>"
            "<|start_header_id|>assistant<|end_header_id|>\n\nnone<|eot_id|><|start_header_id|>user<|end_header_id|>\n\n",
            "<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
        ),
        (LLAMA2, "[INST] <<SYS>>\nDo it.\n<</SYS>>\n\nCaption: a [/INST] none </s>[INST] ", " [/INST]"),
        (
            GEMMA,
            "<start_of_turn>user\nDo it.\n\nCaption: a<end_of_turn>\n<start_of_turn>model\nnone<end_of_turn>\n"
            "<start_of_turn>user\n",
            "<end_of_turn>\n<start_of_turn>model\n",
        ),
        (
            QWEN3,
            "<|im_start|>system\nDo it.<|im_end|>\n<|im_start|>user\nCaption: a<|im_end|>\n"
            "<|im_start|>assistant\nnone<|im_end|>\n<|im_start|>user\n",
            "<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n",
        ),
    ],
    ids=["llama-3", "llama-2", "gemma", "qwen-3"],
)
def test_families(template, before, behind):
    assert chat_parts(tokenizer(template), PREFIX) == (before, behind)


@pytest.mark.parametrize(
    "template",
    [
        "{{ raise_exception('never') }}",
        "{% for m in messages %}{{ m.content }}{{ m.content }}{% endfor %}",
        "{% for m in messages %}{{ m.content | lower }}{% endfor %}",
    ],
)
def test_templates_that_can_t_be_used(template):
    with pytest.raises(EngineError, match=r"chat template .* use plain rendering"):
        chat_parts(tokenizer(template), PREFIX)


def test_plain():
    assert plain_prefix(PREFIX) == "Do it.\n\nCaption: a\nnone\n\n"
    assert plain_text(PREFIX, "Caption: b") == "Do it.\n\nCaption: a\nnone\n\nCaption: b\n"
