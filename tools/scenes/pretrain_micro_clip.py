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
import time
from pathlib import Path

from amp.errors import AmpError, exit_on_error

with exit_on_error():
    from jsonargparse import auto_cli

    from amp.command_line import CommandLine
    from amp.terminal import Terminal, load_open_clip


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
    load_open_clip()
    import open_clip
    import torch
    import torch.nn.functional as F
    from micro_clip_data import CONFIG, measure, normalise, render, texts
    from open_clip.model import CLIP
    from safetensors.torch import save_file
    from scenes import make_scene

    from amp.model.towers import make_backbone

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
