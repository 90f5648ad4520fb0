"""Seconds per query of re-rankers of the same size, all with random weights: what their architectures cost.

    python -m benchmarks.rerankers --out results/rerankers.json

All of them use a ViT-B/16 at 224 pixels (86 million parameters). `stored` starts from what each of them can keep per
image; otherwise the candidates' pixels are encoded for the query. Texts are encoded for each query. The weights are
random, so this says nothing about accuracy.
"""

import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

from amp.errors import exit_on_error, require

with exit_on_error():
    import torch
    import torch.nn as nn
    import torch.nn.functional as F
    from jsonargparse import auto_cli

    import amp
    from amp.files import write_atomically
    from benchmarks.timing import rounded

    transformers = require("transformers", "this benchmark")

MODEL, SIZE = "ViT-B-16", 224
PATCH, WIDTH, LAYERS = 16, 768, 12  # of both towers of BLIP, as in a ViT-B/16 and in BERT's base size
QUERY = "A brown dog jumps over a wooden fence while a man in a red shirt watches"
KNOWLEDGE = amp.Knowledge(
    (
        amp.Triplet("dog", "jumps over", "fence"),
        amp.Triplet("man", "watches", "dog"),
        amp.Triplet("dog", "is", "brown", "attribute"),
        amp.Triplet("shirt", "is", "red", "attribute"),
    ),
    (
        "The dog is in the air above the fence with its legs stretched",
        "The man looks at the dog",
        "The dog is brown",
        "The shirt is red",
    ),
)


class Ours:
    """The recommended adapter: readout and enriched captions, with four triplets and states, packed as int8."""

    def __init__(self):
        model, _, preprocess = amp.create_model_and_transforms(MODEL, prompt_config=amp.PromptConfig())
        self.reranker = amp.Reranker(model, preprocess)

    def encode(self, pixels: torch.Tensor) -> list[bytes]:
        return self.reranker.pack(self.reranker.encode_images(pixels))

    def score(self, stored: list[bytes] | torch.Tensor) -> None:
        self.reranker.rank(QUERY, stored, knowledge=KNOWLEDGE)


class Blip:
    """BLIP's image-text matching head: a text encoder with cross-attention to each image's tokens."""

    def __init__(self):
        common = {"hidden_size": WIDTH, "num_hidden_layers": LAYERS, "intermediate_size": 4 * WIDTH}
        vision = {**common, "patch_size": PATCH, "image_size": SIZE}
        text = {**common, "encoder_hidden_size": WIDTH, "num_attention_heads": 12}
        config = transformers.BlipConfig(vision_config=vision, text_config=text)
        self.model = transformers.BlipForImageTextRetrieval(config).eval()
        self.ids = torch.arange(20)[None] + 1000  # QUERY has 20 word pieces

    def encode(self, pixels: torch.Tensor) -> torch.Tensor:
        return torch.cat([self.model.vision_model(part)[0] for part in pixels.split(32)])

    def score(self, stored: torch.Tensor) -> None:
        tokens = self.encode(stored) if stored.ndim == 4 else stored
        ids = self.ids.expand(len(tokens), -1)
        found = self.model.text_encoder(ids, encoder_hidden_states=tokens, return_dict=True).last_hidden_state
        self.model.itm_head(found[:, 0])


class TextConditioned:
    """Text-conditioned pooling as in FLAIR: the text's feature attends to each image's patches."""

    def __init__(self):
        self.clip, _, _ = amp.create_model_and_transforms(MODEL, prompt_config=amp.PromptConfig(knowledge="none"))
        self.tokenizer = amp.get_tokenizer(MODEL)
        self.pool = nn.MultiheadAttention(self.clip.backbone.embed_dim, 8, batch_first=True).eval()

    def encode(self, pixels: torch.Tensor) -> torch.Tensor:
        visual = self.clip.backbone.visual
        found = []
        for part in pixels.split(32):
            tokens = visual.transformer(visual.ln_pre(visual._embeds(part)))
            found.append(visual.ln_post(tokens[:, 1:]) @ visual.proj)
        return torch.cat(found)

    def score(self, stored: torch.Tensor) -> None:
        patches = self.encode(stored) if stored.ndim == 4 else stored
        text = self.clip.backbone.encode_text(self.tokenizer([QUERY]))
        pooled, _ = self.pool(text.expand(len(patches), 1, -1), patches, patches, need_weights=False)
        F.cosine_similarity(pooled[:, 0], text)


class LateInteraction(TextConditioned):
    """Late interaction as in FILIP and ColBERT: the best patch of each word, averaged."""

    def score(self, stored: torch.Tensor) -> None:
        patches = F.normalize(self.encode(stored) if stored.ndim == 4 else stored, dim=-1)
        clip, ids = self.clip.backbone.clip, self.tokenizer([QUERY])
        x = clip.token_embedding(ids) + clip.positional_embedding
        words = clip.ln_final(clip.transformer(x, attn_mask=clip.attn_mask)) @ clip.text_projection
        words = F.normalize(words[0, : int(ids.argmax()) + 1], dim=-1)
        (patches @ words.T).amax(dim=1).mean(dim=1)


RERANKERS: dict[str, Callable] = {
    "ours": Ours,
    "BLIP, matching head": Blip,
    "text-conditioned pooling": TextConditioned,
    "late interaction": LateInteraction,
}


@torch.no_grad()
def main(
    candidates: list[int] = [20, 50, 100],  # noqa: B006
    rounds: int = 5,
    threads: int = 1,
    out: Path = Path("runs/rerankers.json"),
) -> None:
    """Measures seconds per query.

    Args:
        candidates: Numbers of candidates.
        rounds: Number of measurements; the median is reported. Without stored states there is only one.
        threads: Threads of PyTorch.
        out: File of the figures.
    """
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    made = {name: make() for name, make in RERANKERS.items()}
    pixels = torch.randn(max(candidates), 3, SIZE, SIZE)
    stored = {name: reranker.encode(pixels) for name, reranker in made.items()}
    rows = []
    for count in candidates:
        seconds: dict[str, list[float]] = {name: [] for name in made}
        for turn in range(rounds + 1):  # in turns, so that a change of the machine's speed affects all
            for name, reranker in made.items():
                begin = time.perf_counter()
                reranker.score(stored[name][:count])
                seconds[name] += [time.perf_counter() - begin] if turn else []
        for name, reranker in made.items():
            begin = time.perf_counter()
            reranker.score(pixels[:count])
            unstored = time.perf_counter() - begin
            row = {"stored": statistics.median(seconds[name]), "not_stored": unstored}
            rows.append({"reranker": name, "candidates": count, **{key: rounded(x) for key, x in row.items()}})
            print(rows[-1], flush=True)
    found = {"threads": threads, "model": MODEL, "size": SIZE, "bytes_per_image": sizes(stored), "seconds": rows}
    write_atomically(out, (json.dumps(found, indent=1) + "\n").encode())


def sizes(stored: dict) -> dict[str, int]:
    """Bytes that each re-ranker stores per image: ours packed, the others in float32."""
    return {name: len(kept[0]) if isinstance(kept, list) else kept[0].nbytes for name, kept in stored.items()}


if __name__ == "__main__":
    with exit_on_error():
        auto_cli(main, as_positional=False)
