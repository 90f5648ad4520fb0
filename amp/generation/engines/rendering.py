"""Renders the turns of a conversation, with a chat template or as plain text."""

from __future__ import annotations

import re
from collections.abc import Sequence

from amp.generation.engines.base import EngineError, Message

_SENTINEL = "SUFFIX-GOES-HERE"
_MARK = re.compile(r"(<<|<[|｜]?|\[)([/\w▁|｜]{1,40}?)([|｜]?>|>>|\])")


def plain_text(prefix: Sequence[Message], suffix: str) -> str:
    """Renders a prompt for a model without chat template: instructions, then pairs of question and answer."""
    return plain_prefix(prefix) + suffix + "\n"


def without_marks(text: str) -> str:
    """Inserts spaces into control tokens of chat templates in a suffix: `<|im_end|>`, `</s>`, `[INST]` and so on.

    Some servers interpret control tokens anywhere in a prompt.
    """
    return _MARK.sub(lambda match: f"{match[1]} {match[2]} {match[3]}", text)


def plain_prefix(prefix: Sequence[Message]) -> str:
    """The part of `plain_text` before the suffix."""
    ends = {"system": "\n\n", "user": "\n", "assistant": "\n\n"}
    return "".join(content + ends[role] for role, content in prefix)


def chat_parts(tokenizer, prefix: Sequence[Message]) -> tuple[str, str]:
    """Renders the chat template and returns (text before the content of the last user turn, text after it).

    If the template has no system role (Gemma), the instructions go into the first user turn. Thinking is turned off for
    models that support it (Qwen3).

    Raises:
        EngineError: The template refuses the prompt, or changes or repeats the content of a user turn.
    """
    turns = [{"role": role, "content": content} for role, content in (*prefix, Message("user", _SENTINEL))]
    try:
        text = _apply(tokenizer, turns)
    except Exception as error:  # templates may raise any exception
        if turns[0]["role"] != "system" or len(turns) < 2:
            raise _refused(error) from None
        merged = {"role": "user", "content": f"{turns[0]['content']}\n\n{turns[1]['content']}"}
        try:
            text = _apply(tokenizer, [merged, *turns[2:]])
        except Exception as second:
            raise EngineError(f"the model's chat template refuses the prompt ({second}); use plain rendering") from None
    before, found, behind = text.partition(_SENTINEL)
    if not found or _SENTINEL in behind:
        raise EngineError("the model's chat template doesn't render the user's text exactly once; use plain rendering")
    return before, behind


def _refused(error: Exception) -> EngineError:
    return EngineError(f"the model's chat template refuses the prompt ({error}); use plain rendering")


def _apply(tokenizer, turns: list[dict[str, str]]) -> str:
    return tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True, enable_thinking=False)
