"""Pre-training data of the micro CLIP, and its retrieval figures on the demo's scenes."""

import random

import numpy as np
import torch
import torch.nn.functional as F
from open_clip.model import CLIP
from PIL import Image
from scene_language import PLACE_WORDS, noun_phrase, pick
from scenes import captions, draw, make_scene

from amp.knowledge.schema import Triplet
from amp.knowledge.text import state_text

STORED = 144  # pixels: pictures are drawn at this size, as in make_scenes.py, and resized for the model
CONFIG = {
    "model_cfg": {
        "embed_dim": 96,
        # Three different widths, so that code which assumes equal widths fails.
        "vision_cfg": {"image_size": 72, "patch_size": 12, "width": 128, "head_width": 32, "layers": 6},
        "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 64, "heads": 4, "layers": 3},
    },
    "preprocess_cfg": {
        "size": 72,
        "mode": "RGB",
        "mean": [0.5, 0.5, 0.5],
        "std": [0.5, 0.5, 0.5],
        "interpolation": "bicubic",
        "resize_mode": "squash",
    },
}
PIXELS = CONFIG["preprocess_cfg"]["size"]


def render(scenes) -> torch.Tensor:
    """Draws scenes at the model's size: uint8 (N, 3, PIXELS, PIXELS)."""
    pictures = np.empty((len(scenes), PIXELS, PIXELS, 3), np.uint8)
    for k, scene in enumerate(scenes):
        pictures[k] = draw(scene, STORED).resize((PIXELS, PIXELS), Image.Resampling.BICUBIC)
    return torch.from_numpy(pictures).permute(0, 3, 1, 2).contiguous()


def normalise(pictures: torch.Tensor) -> torch.Tensor:
    """Normalizes uint8 pictures with the mean and std of preprocess_cfg."""
    return pictures.float().div_(127.5).sub_(1.0)


def alt_text(scene, rng: random.Random) -> str:
    """Names the actors, in either order, and sometimes the place, but never the action."""
    mentions = [frozenset(m for m, p in (("colour", 0.8), ("size", 0.3)) if rng.random() < p) for _ in range(2)]
    nouns = [noun_phrase(actor, m, "a") for actor, m in zip(scene.actors, mentions, strict=True)]
    if rng.random() < 0.5:
        nouns.reverse()
    text = pick(rng, ["{} and {}", "a picture of {} and {}", "{} with {}", "{} near {}"]).format(*nouns)
    if rng.random() < 0.3:
        text += " " + pick(rng, PLACE_WORDS[scene.place])
    return text


def texts(scene, count: int, caption_share: float, state_share: float) -> list[str]:
    """Makes `count` pre-training texts of a scene: captions and states with the given probabilities, else alt texts."""
    rng = random.Random(f"open-clip-amp pre-training texts {scene.name}")
    said = captions(scene, 2 * count)
    out = []
    for _ in range(count):
        kind, one = rng.random(), pick(rng, said)
        if kind < caption_share:
            out.append(one.text)
        elif kind < caption_share + state_share:
            k = int(rng.random() * len(one.states))
            state = one.states[k]
            # The text tower must know words and length of the state prompt, which is used to encode knowledge.
            prompt = state_text(Triplet(**one.triplets[k]), state)
            out.append(pick(rng, [state, f"{one.text} {state}", prompt]))
        else:
            out.append(alt_text(scene, rng))
    return out


def recalls(ranks: torch.Tensor) -> dict[str, float]:
    """R@1/5/10/20 in percent, for ranks that start at 0."""
    return {f"R@{k}": round(100 * (ranks < k).double().mean().item(), 1) for k in (1, 5, 10, 20)}


@torch.no_grad()
def measure(model: CLIP, tokenizer, seed: int, split: str, count: int) -> dict:
    """Measures retrieval on a demo split, with all captions in both directions, and the accuracy on twins (chance: 50).

    Twin accuracy is the percentage of captions that score their own picture above the picture of the scene's twin.
    """
    scenes = [make_scene(seed, split, i) for i in range(count)]
    sentences = [[c.text for c in captions(scene)] for scene in scenes]
    owner = torch.tensor([i for i, group in enumerate(sentences) for _ in group])
    tokens = tokenizer([text for group in sentences for text in group])
    image = F.normalize(model.encode_image(normalise(render(scenes))), dim=-1)
    text = F.normalize(model.encode_text(tokens), dim=-1)
    similarity = text @ image.T  # captions x images
    own = similarity[torch.arange(len(owner)), owner]
    t2i = (similarity > own[:, None]).sum(1)
    best = torch.stack([similarity[owner == i, i].max() for i in range(count)])
    i2t = (similarity > best[None]).sum(0)
    result = {"images": count, "captions": len(owner), "t2i": recalls(t2i), "i2t": recalls(i2t)}
    for change in ("roles", "action"):
        pairs = [(i, s.twin) for i, s in enumerate(scenes) if s.change == change]
        wins = [(own[owner == x] > similarity[owner == x, y]).double() for i, j in pairs for x, y in ((i, j), (j, i))]
        result[f"twin_accuracy_{change}"] = round(100 * torch.cat(wins).mean().item(), 1)
    return result
