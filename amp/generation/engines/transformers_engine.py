"""Any causal language model of transformers, in this process, with a shared prefix, batches and grammars."""

from __future__ import annotations

import copy
import inspect
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from amp.errors import require
from amp.generation.engines.base import Completion, EngineError, Message, Sampling
from amp.generation.engines.model_files import find_model
from amp.generation.engines.rendering import chat_parts, plain_prefix
from amp.generation.grammar import Grammar


@dataclass
class _Prefix:
    """The shared turns: token ids (P), key-value cache of one row, and the tokens after a suffix."""

    ids: list[int]
    tail: list[int]
    cache: Any
    one_length: bool  # whether all rows of a batch must have the same length


class TransformersEngine:
    """A local or hub model, or a GGUF file.

    The shared turns are computed once, and every batch starts from a copy of their key-value cache. Requests are sorted
    by length and padded on the left. Finished rows leave the batch. In float32 a reply does not depend on the rest of
    the batch; in bfloat16 single words may differ.

    To use several GPUs, start one process per GPU with `accelerate launch`. The captions are split among them.

    Args:
        model: Hub name, folder, or .gguf file.
        revision: Revision of the model on the hub.
        rendering: chat uses the tokenizer's chat template; plain continues text; auto uses chat if there is a template.
        dtype: Precision of the weights; auto is float32 on a CPU, else bfloat16.
        batch_size: Number of replies generated together; halved when the GPU runs out of memory.
        device: Device, such as cuda:1 or cpu; auto takes this process's GPU if there is one; spread distributes a model
            that is too large for one GPU over all GPUs.
        constrained: Whether replies must follow the grammar; auto does so if llguidance supports the tokenizer.
        gguf_folder: Folder for unpacked GGUF files; null takes ~/.cache/open-clip-amp/gguf.
        trust_remote_code: Whether to run code that comes with the model.

    Attributes:
        model: The transformers model, in eval mode, without gradients.
        tokenizer: The tokenizer of the model.
        ends: Tokens that end a reply.

    Raises:
        EngineError: The model can't be loaded or used.
    """

    def __init__(
        self,
        model: str = "",
        revision: str | None = None,
        rendering: Literal["auto", "chat", "plain"] = "auto",
        dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto",
        batch_size: int = 32,
        device: str = "auto",
        constrained: bool | Literal["auto"] = "auto",
        gguf_folder: str | None = None,
        trust_remote_code: bool = False,
    ) -> None:
        import torch

        require("transformers", "the transformers engine")
        from transformers import AutoModelForCausalLM, AutoTokenizer
        from transformers.utils import logging

        if batch_size < 1:
            raise EngineError(f"transformers.batch_size is {batch_size}; expected at least 1; correct it")
        logging.disable_progress_bar()
        self._torch, self._batch_size = torch, batch_size
        place, origin = find_model(model, revision, gguf_folder)
        self._device = _device(torch, device)
        if dtype == "auto":
            dtype = "float32" if self._device.type == "cpu" else "bfloat16"
        options = {"revision": revision, "trust_remote_code": trust_remote_code}
        placing = {"device_map": "auto"} if device == "spread" else {}
        try:
            self.tokenizer = AutoTokenizer.from_pretrained(place, **options)
            self.model = AutoModelForCausalLM.from_pretrained(place, dtype=getattr(torch, dtype), **placing, **options)
        except (OSError, ValueError, ImportError, KeyError, RuntimeError) as error:
            first = str(error).strip().partition("\n")[0]
            raise EngineError(
                f"{model}: can't be loaded as a causal language model ({first}); expected a hub name, a folder or a "
                ".gguf file; check --model, and whether the hub can be reached"
            ) from None
        self.model.requires_grad_(False).eval()
        if device != "spread":
            self.model.to(self._device)
        self._chat = rendering == "chat" or (rendering == "auto" and bool(self.tokenizer.chat_template))
        if self._chat and not self.tokenizer.chat_template:
            raise EngineError(f"{model}: its tokenizer has no chat template; expected one; use plain rendering")
        config = self.model.config.get_text_config()
        self._limit = getattr(config, "max_position_embeddings", None) or 2**31
        self.ends = self._end_tokens()
        self._constraint = self._make_constraint(constrained, config.vocab_size)
        self.constrained = self._constraint is not None
        self.watch_added_tokens()
        self._prefixes: dict[tuple[Message, ...], _Prefix] = {}
        self._forward_options = (
            {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(self.model.forward).parameters else {}
        )
        commit = getattr(self.model.config, "_commit_hash", None)
        self._described: dict[str, Any] = {
            "engine": "transformers",
            "model": Path(model).name if origin else model,
            "weights": origin or {"revision": commit or revision},
            "rendering": "chat" if self._chat else "plain",
            "dtype": dtype,
            "constrained": self.constrained,
        }

    def watch_added_tokens(self) -> None:
        """Collects the tokens that no suffix may contain: all that were added to the tokenizer's vocabulary."""
        marks = {text: token for text, token in self.tokenizer.get_added_vocab().items() if len(text) > 1}
        self._added = frozenset(marks.values())
        self._added_texts = re.compile(f"({'|'.join(map(re.escape, sorted(marks, key=len, reverse=True))) or '(?!)'})")

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
        """See `Engine.generate`. Long requests come first."""
        shared = self._prefix(tuple(prefix))
        rows = [self.suffix_ids(text) + shared.tail for text in suffixes]
        room = self._limit - len(shared.ids) - sampling.max_tokens
        for number, ids in enumerate(rows):
            if len(ids) > room:
                reason = f"{len(ids)} tokens after the shared ones; the model has room for {max(room, 0)}"
                yield number, Completion("", error=reason, refused=True)
        waiting = sorted((n for n, ids in enumerate(rows) if len(ids) <= room), key=lambda n: (-len(rows[n]), n))
        size = self._batch_size
        while waiting:
            batch = waiting[:size]
            if shared.one_length:
                batch = [number for number in batch if len(rows[number]) == len(rows[batch[0]])]
            try:
                replies = self._decode(
                    shared,
                    [rows[number] for number in batch],
                    [grammar[number] for number in batch] if grammar and self._constraint else None,
                    sampling,
                    [seeds[number] if seeds else 0 for number in batch],
                )
            except self._torch.OutOfMemoryError:
                if len(batch) == 1:
                    raise EngineError(
                        "out of memory with a batch of one request; expected room for it and the model; use a smaller "
                        "dtype, a smaller model, or --transformers.device spread"
                    ) from None
                size = len(batch) // 2
                self._torch.cuda.empty_cache()
                continue
            waiting = waiting[len(batch) :]
            for number, tokens in zip(batch, replies, strict=True):
                text = self._text(tokens, sampling.stop)
                yield number, Completion(text, len(tokens), len(shared.ids) + len(rows[number]))

    def prefix_ids(self, prefix: tuple[Message, ...]) -> tuple[list[int], list[int]]:
        """Returns (tokens before every suffix, tokens after it)."""
        if self._chat:
            before, behind = chat_parts(self.tokenizer, prefix)  # the text already contains all special tokens
            return self._ids(before), self._ids(behind)
        # The last newline goes to the suffix: many tokenizers merge two newlines into one token, but not before a word.
        return self.tokenizer(plain_prefix(prefix)[:-1])["input_ids"], self._continued("\n")

    def suffix_ids(self, text: str) -> list[int]:
        """Tokens of a suffix. No text in it becomes a special token."""
        text = text if self._chat else f"\n{text}"
        ids = self._continued(text, split_special_tokens=True)
        if self._added.isdisjoint(ids):
            return ids
        # <think>, <tool_call> and so on are added tokens but not special ones: tokenize them in two parts.
        ids = []
        for part in self._added_texts.split(text):
            for half in (part[:1], part[1:]) if self._added_texts.fullmatch(part) else (part,):
                ids += self._continued(half, split_special_tokens=True) if half else []
        return ids

    def _continued(self, text: str, **options) -> list[int]:
        """Tokens of a text as if after a newline, since SentencePiece would otherwise prepend a space."""
        mark = self._ids("\n", **options)
        ids = self._ids("\n" + text, **options)
        return ids[len(mark) :] if ids[: len(mark)] == mark else self._ids(text, **options)

    def _ids(self, text: str, **options) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False, **options)["input_ids"]

    def _prefix(self, prefix: tuple[Message, ...]) -> _Prefix:
        if prefix not in self._prefixes:
            ids, tail = self.prefix_ids(prefix)
            with self._torch.inference_mode():
                tokens = self._torch.tensor([ids], device=self._device)
                cache = self.model(tokens, use_cache=True, **self._forward_options).past_key_values
            # Layers with a sliding window or a recurrent state would treat padding between prefix and suffix as text.
            plain = all(type(layer).__name__ == "DynamicLayer" for layer in cache.layers)
            self._prefixes[prefix] = _Prefix(ids, tail, cache, one_length=not plain)
        return self._prefixes[prefix]

    def _decode(
        self,
        shared: _Prefix,
        rows: list[list[int]],
        grammars: list[Grammar] | None,
        sampling: Sampling,
        seeds: list[int],
    ) -> list[list[int]]:
        """Returns the new tokens of each row, without the end token."""
        torch, device = self._torch, self._device
        with torch.inference_mode():
            before, width = len(shared.ids), max(map(len, rows))
            tokens = torch.zeros(len(rows), width, dtype=torch.long)
            seen = torch.ones(len(rows), before + width, dtype=torch.long)  # 0 at the padding between prefix and suffix
            for row, ids in enumerate(rows):
                tokens[row, width - len(ids) :] = torch.tensor(ids)
                seen[row, before : before + width - len(ids)] = 0
            tokens, seen = tokens.to(device), seen.to(device)
            positions = (seen.cumsum(1) - 1)[:, before:].clamp(min=0)
            cache = copy.deepcopy(shared.cache)
            cache.batch_repeat_interleave(len(rows))
            constraint = self._constraint.rows(grammars) if grammars else None
            draws = [torch.Generator().manual_seed(seed % 2**63) for seed in seeds]
            replies: list[list[int]] = [[] for _ in rows]
            alive = list(range(len(rows)))
            for _ in range(sampling.max_tokens):
                logits = (
                    self.model(
                        tokens,
                        attention_mask=seen,
                        position_ids=positions,
                        past_key_values=cache,
                        use_cache=True,
                        **self._forward_options,
                    )
                    .logits[:, -1]
                    .float()
                )
                if constraint:
                    logits = constraint.mask(logits)
                if sampling.temperature:
                    noise = torch.stack([self._gumbel(logits.shape[1], draws[row]) for row in alive])
                    logits = logits / sampling.temperature + noise.to(device)
                chosen = logits.argmax(1).tolist()
                ended = constraint.advance(chosen) if constraint else [False] * len(chosen)
                kept = []
                for place, (row, token) in enumerate(zip(alive, chosen, strict=True)):
                    if token in self.ends:
                        continue
                    replies[row].append(token)
                    if not ended[place] and not self._stopped(replies[row], sampling.stop):
                        kept.append(place)
                if not kept:
                    break
                if len(kept) < len(alive):
                    index = torch.tensor(kept, device=device)
                    cache.batch_select_indices(index)
                    seen, positions = seen[index], positions[index]
                    if constraint:
                        constraint.keep(kept)
                    alive = [alive[place] for place in kept]
                tokens = torch.tensor([[replies[row][-1]] for row in alive], device=device)
                seen = torch.cat([seen, seen.new_ones(len(alive), 1)], 1)
                positions = positions[:, -1:] + 1
        return replies

    def _gumbel(self, size: int, draw):
        """Gumbel noise, which turns the argmax into a sample. Drawn per row, so it is independent of the batch."""
        uniform = self._torch.rand(size, generator=draw).clamp_(1e-20, 1 - 1e-7)
        return -(-uniform.log()).log()

    def _stopped(self, tokens: list[int], stop: str) -> bool:
        """Whether a plain reply contains the stop text. A chat model ends its turn itself."""
        return not self._chat and stop in self.tokenizer.decode(tokens[-8:])

    def _text(self, tokens: list[int], stop: str) -> str:
        text = self.tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return (text if self._chat else text.partition(stop)[0]).strip()

    def _end_tokens(self) -> frozenset[int]:
        configured = self.model.generation_config.eos_token_id
        known = configured if isinstance(configured, list) else [configured]
        found = frozenset(token for token in (*known, self.tokenizer.eos_token_id) if token is not None)
        if not found:
            raise EngineError("the model has no end token; expected eos_token_id; add it to its config")
        return found

    def _make_constraint(self, constrained: bool | str, vocabulary: int):
        if not constrained:
            return None
        from amp.generation.engines.constrain import Constraint

        try:
            return Constraint(self.tokenizer, vocabulary, sorted(self.ends))
        except EngineError:
            if constrained == "auto":
                return None
            raise


def _device(torch, name: str):
    from amp.device import usable_device

    if name not in ("auto", "spread"):
        return usable_device(name)
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)) if name == "auto" else 0)
    return torch.device("cpu")
