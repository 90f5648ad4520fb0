"""Turns of a conversation as a model reads them: its chat template, or plain text."""

from __future__ import annotations

import re
from collections.abc import Sequence

from amp.generation.engines.base import EngineError, Message

_SENTINEL = "SUFFIX-GOES-HERE"
_MARK = re.compile(r"(<<|<[|｜]?|\[)([/\w▁|｜]{1,40}?)([|｜]?>|>>|\])")


def plain_text(prefix: Sequence[Message], suffix: str) -> str:
    """For a model that only continues text: instructions, then question, newline, answer, empty line, and so on."""
    return plain_prefix(prefix) + suffix + "\n"


def without_marks(text: str) -> str:
    """A suffix in which no control mark of a chat template is left, for servers that read them anywhere in a prompt:
    spaces stand around the brackets of ``<|im_end|>``, ``</s>``, ``[INST]`` and the like."""
    return _MARK.sub(lambda match: f"{match[1]} {match[2]} {match[3]}", text)


def plain_prefix(prefix: Sequence[Message]) -> str:
    """The part of `plain_text` before the suffix."""
    ends = {"system": "\n\n", "user": "\n", "assistant": "\n\n"}
    return "".join(content + ends[role] for role, content in prefix)


def chat_parts(tokenizer, prefix: Sequence[Message]) -> tuple[str, str]:
    """(text before the last user turn's content, text after it) by the tokenizer's chat template.

    Instructions go into the first user turn where the template has no system role (Gemma). A model that can think
    before it answers (Qwen3) is asked not to.

    Raises:
        EngineError: A template that changes or repeats what a user says.
    """
    turns = [{"role": role, "content": content} for role, content in (*prefix, Message("user", _SENTINEL))]
    try:
        text = _apply(tokenizer, turns)
    except Exception as error:  # templates raise any exception
        if turns[0]["role"] != "system" or len(turns) < 2:
            raise _refused(error) from None
        merged = {"role": "user", "content": f"{turns[0]['content']}\n\n{turns[1]['content']}"}
        try:
            text = _apply(tokenizer, [merged, *turns[2:]])
        except Exception as second:
            raise EngineError(
                f"the model's chat template refuses the prompt ({second}); take plain rendering"
            ) from None
    before, found, behind = text.partition(_SENTINEL)
    if not found or _SENTINEL in behind:
        raise EngineError(
            "the model's chat template doesn't show what the user says exactly once; take plain rendering"
        )
    return before, behind


def _refused(error: Exception) -> EngineError:
    return EngineError(f"the model's chat template refuses the prompt ({error}); take plain rendering")


def _apply(tokenizer, turns: list[dict[str, str]]) -> str:
    return tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True, enable_thinking=False)
