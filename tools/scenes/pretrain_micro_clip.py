"""Pre-trains the micro CLIP of the demo on scenes of another seed, and saves it as an open_clip folder.

    OMP_NUM_THREADS=1 python tools/scenes/pretrain_micro_clip.py --out tools/scenes/micro-clip

The result should have the usual strength and weakness of CLIP: it finds the right objects, but often the wrong action
or role. As for large CLIPs, the reason is the training data. Most texts only name the objects (like alt texts), some
are full captions, and some describe a state. Batches rarely contain twins, so objects decide nearly every comparison.
"""

import hashlib
import json
import math
import os
import random
import time
from pathlib import Path

from amp.errors import AmpError, exit_on_error

with exit_on_error():
    import numpy as np
    import open_clip
    import torch
    import torch.nn.functional as F
    from jsonargparse import auto_cli
    from open_clip.model import CLIP
    from PIL import Image
    from safetensors.torch import save_file
    from scene_language import PLACE_WORDS, noun_phrase, pick
    from scenes import captions, draw, make_scene

    from amp.command_line import CommandLine
    from amp.knowledge.schema import Triplet
    from amp.knowledge.text import state_text
    from amp.model.towers import make_backbone
    from amp.terminal import Terminal

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


def pretrain(
    out: Path,
    seed: int = 1000,
    scenes: int = 24000,
    texts_per_scene: int = 6,
    caption_share: float = 0.3,
    state_share: float = 0.1,
    steps: int = 2200,
    batch: int = 64,
    lr: float = 1.5e-3,
    weight_decay: float = 0.1,
    warmup: int = 100,
    demo_seed: int = 0,
    demo_images: int = 200,
) -> dict:
    """Pre-trains the micro CLIP and writes open_clip_config.json, open_clip_model.safetensors and figures.json.

    Args:
        out: Folder to write, which open_clip loads as `local-dir:OUT`.
        seed: Random seed of the pre-training scenes, the initialisation and the batch order. Must differ from
            `demo_seed`.
        scenes: Number of pre-training scenes.
        texts_per_scene: Number of texts per scene. Each batch uses one of them.
        caption_share: Fraction of texts that are full captions.
        state_share: Fraction of texts that describe a state. The rest are alt texts, which name no action.
        steps: Number of optimizer steps.
        batch: Number of pairs per step.
        lr: Peak learning rate (AdamW, cosine schedule to zero).
        weight_decay: Weight decay of matrices. Vectors and embeddings have none.
        warmup: Number of linear warm-up steps.
        demo_seed: Random seed of the demo data. The figures are measured on its test split.
        demo_images: Number of scenes of that split to measure on, from the start.
    """
    settings = {name: value for name, value in locals().items() if name != "out"}
    if seed == demo_seed:
        raise AmpError(
            f"seed and demo_seed are both {seed}, expected different seeds, or the demo would test on scenes seen here"
        )
    torch.manual_seed(seed)
    started = time.time()
    tokenizer = open_clip.tokenizer.SimpleTokenizer()
    model = CLIP(**CONFIG["model_cfg"])
    # Its text tower trims padding, which saves time and doesn't change the result. Making it freezes the model.
    backbone = make_backbone(model)
    model.requires_grad_(True)
    world = [make_scene(seed, "pretrain", i) for i in range(scenes)]
    pictures = render(world)
    tokens = torch.stack([tokenizer(texts(s, texts_per_scene, caption_share, state_share)) for s in world]).int()
    print(f"{scenes} scenes, {scenes * texts_per_scene} texts made in {time.time() - started:.0f} s", flush=True)

    decayed = [p for n, p in model.named_parameters() if p.ndim >= 2 and "embedding" not in n]
    others = [p for n, p in model.named_parameters() if not (p.ndim >= 2 and "embedding" not in n)]
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.98), fused=True)
    generator = torch.Generator().manual_seed(seed)
    order = torch.cat([torch.randperm(scenes, generator=generator) for _ in range(-(-steps * batch // scenes))])
    target = torch.arange(batch)
    with Terminal(True).progress("pre-training", "steps", keep=True) as report:
        for step in range(steps):
            rows = order[step * batch : (step + 1) * batch]
            images = normalise(pictures[rows])
            flip = torch.rand(batch, generator=generator) < 0.5  # no text mentions left or right
            images[flip] = images[flip].flip(-1)
            chosen = tokens[rows, torch.randint(texts_per_scene, (batch,), generator=generator)].long()
            image = F.normalize(model.encode_image(images), dim=-1)
            text = F.normalize(backbone.encode_text(chosen), dim=-1)
            logits = model.logit_scale.exp() * image @ text.T
            loss = (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
            rate = lr * min((step + 1) / warmup, 0.5 * (1 + math.cos(math.pi * step / steps)))
            for group in optimizer.param_groups:
                group["lr"] = rate
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            with torch.no_grad():
                model.logit_scale.clamp_(0, math.log(100))
            report(step + 1, steps, f"loss {loss.item():.3f}")

    with torch.no_grad():  # zero the embeddings of unseen words: they hold only noise, and zeros compress well in git
        seen = torch.zeros(len(model.token_embedding.weight), dtype=torch.bool)
        seen[tokens.unique().long()] = True
        model.token_embedding.weight[~seen] = 0
    state = {name: tensor.half().contiguous() for name, tensor in model.state_dict().items()}
    model.load_state_dict(state)  # measure the weights as saved, in half precision
    out.mkdir(parents=True, exist_ok=True)
    weights = out / "open_clip_model.safetensors"
    save_file(state, out / "open_clip_model.safetensors.tmp", metadata={"format": "pt"})
    (out / "open_clip_model.safetensors.tmp").chmod(0o644)  # safetensors writes files that only the owner can read
    os.replace(out / "open_clip_model.safetensors.tmp", weights)
    figures = {
        "settings": settings,
        "final_loss": round(loss.item(), 3),
        "parameters": sum(p.numel() for p in model.parameters()),
        "words_seen": int(seen.sum()),
        "bytes": weights.stat().st_size,
        "sha256": hashlib.sha256(weights.read_bytes()).hexdigest(),
        "minutes": round((time.time() - started) / 60, 1),
        "demo_test": measure(model, tokenizer, demo_seed, "test", demo_images),
    }
    for name, content in (("open_clip_config.json", CONFIG), ("figures.json", figures)):
        (out / f"{name}.tmp").write_text(json.dumps(content, indent=2) + "\n")
        os.replace(out / f"{name}.tmp", out / name)
    print(json.dumps(figures, indent=2))
    return figures


if __name__ == "__main__":
    with exit_on_error():
        auto_cli(pretrain, as_positional=False, parser_class=CommandLine)
