"""Search as a loop over (image, caption) pairs; each pair is scored by one public call of the model."""

import json
from pathlib import Path

import open_clip
import torch
import torch.nn.functional as F
from PIL import Image

import amp
from amp.knowledge.tensors import Captions
from amp.model.interactions.base import Prompts
from support.equations.ranking import two_stages


@torch.no_grad()
def base_score(model, image, caption: str) -> float:
    """Cosine of an image (3, H, W) and a caption with the frozen CLIP."""
    return _cosine(model.encode_image(image[None]), model.encode_text(model.tokenizer([caption])))


@torch.no_grad()
def pair_score(model, image, caption: str, knowledge, text=None) -> float:
    """Cosine of an image (3, H, W) and a caption, both conditioned on the caption's knowledge.

    Args:
        model: An `ActionAwareCLIP`; controls ignore the knowledge.
        image: Output of the model's transform.
        caption: Text of the caption.
        knowledge: Knowledge of the caption.
        text: Feature (1, d) of the caption without knowledge; computed if it is not given.
    """
    tokens = model.tokenizer([caption])
    text = model.encode_text(tokens) if text is None else text
    if model.interaction.conditioned:
        feature = model.encode_image(image[None], [knowledge], text=text)
    else:
        feature = model.image_features(image[None])
    return _cosine(feature, model.encode_text(tokens, knowledge=[knowledge]) if model.config.enrich else text)


def pooled_scores(world, image: int, captions: list[int]) -> list[float]:
    """Cosines of these captions and the image conditioned on all their prompts, joined without padding."""
    model, parts = world.model, []
    for number in captions:
        knowledge = model.prepare_knowledge([world.captions.knowledge[number]])
        prompts = model(None, Captions(knowledge, world.text[number][None])).captions.prompts
        # A caption without knowledge contributes its null prompts.
        parts.append([part[0][prompts.mask[0]] for part in prompts.parts])
    joined = [torch.cat(part)[None] for part in zip(*parts, strict=True)]
    united = Prompts(tuple(joined), torch.ones(joined[0].shape[:2], dtype=torch.bool))
    encoded = model.interaction.encode_images(model.tower, model.tower.early(world.images[[image]]))
    feature = model.interaction.pairs(model.tower, encoded, united, torch.tensor([0]))[0]
    return [_cosine(feature, world.text[caption]) for caption in captions]


@torch.no_grad()
def search_split(world, direction: str, top_k: int, fusion_weight: float = 0.0):
    """Scores (Q, k) and 0-based ranks (Q,) for one direction, as named by `support.evaluation.ranked`."""
    base = world.model.encode_image(world.images, normalize=True)
    text = F.normalize(torch.stack(world.text), dim=-1)
    owner = world.captions.image.tolist()

    def pair(image, caption):
        captions, plain = world.captions, world.text[caption][None]
        return pair_score(world.model, world.images[image], captions.texts[caption], captions.knowledge[caption], plain)

    def score(query, top):
        if direction == "t2i":
            return [pair(image, query) for image in top]
        if direction == "i2t pooled":
            return pooled_scores(world, query, top)
        return [pair(query, caption) for caption in top]

    all_scores, ranks = [], []
    for query in range(len(owner) if direction == "t2i" else len(base)):
        first = (base @ text[query] if direction == "t2i" else text @ base[query]).tolist()
        order, scores = two_stages(first, top_k, lambda top, query=query: score(query, top), fusion_weight)
        hits = [owner[query] == item if direction == "t2i" else owner[item] == query for item in order]
        all_scores.append(list(scores.values()))
        ranks.append(hits.index(True))
    return torch.tensor(all_scores), torch.tensor(ranks)


def search_photos(model, preprocess, photos: list[Path], caption: str, knowledge, top_k: int, fusion_weight=0.0):
    """Ranked photos as (path, score, score of the frozen CLIP). After the first `top_k` both scores are CLIP's."""
    images = [preprocess(Image.open(path).convert("RGB")) for path in photos]
    base = [base_score(model, image, caption) for image in images]
    order, new = two_stages(
        base, top_k, lambda top: [pair_score(model, images[i], caption, knowledge) for i in top], fusion_weight
    )
    return [(photos[i], new[i] + fusion_weight * base[i] if i in new else base[i], base[i]) for i in order]


@torch.no_grad()
def won_comparisons(scenes: Path, base: str, model=None) -> dict[str, tuple[int, int]]:
    """Numbers of comparisons between drawn twins, won and total, by kind of change.

    Args:
        scenes: Folder of the scenes.
        base: Name of the base model.
        model: An `ActionAwareCLIP`; without it open_clip itself is used, without any code of this package.
    """
    data = json.loads((scenes / "dataset.json").read_text())["images"]
    lines = [json.loads(line) for line in (scenes / "knowledge.jsonl").read_text().splitlines()]
    clip, _, preprocess = open_clip.create_model_and_transforms(base)
    clip.eval()
    tokenizer = open_clip.get_tokenizer(base)
    by_name = {image["filename"]: image for image in data}
    count = {"roles": [0, 0], "action": [0, 0]}

    def score(name: str, sentence: dict) -> float:
        picture = preprocess(Image.open(scenes / "images" / name))
        if model is None:
            return _cosine(clip.encode_image(picture[None]), clip.encode_text(tokenizer([sentence["raw"]])))
        line = lines[sentence["sentid"]]
        known = amp.Knowledge(tuple(amp.Triplet(**t) for t in line["triplets"]), tuple(line["states"]))
        return pair_score(model, picture, sentence["raw"], known)

    for image in data:
        if "twin" in image:
            for own, other in ((image, by_name[image["twin"]]), (by_name[image["twin"]], image)):
                for sentence in own["sentences"]:
                    count[image["change"]][0] += score(own["filename"], sentence) > score(other["filename"], sentence)
                    count[image["change"]][1] += 1
    return {change: tuple(value) for change, value in count.items()}


def _cosine(feature, text) -> float:
    return float(F.cosine_similarity(feature, text, dim=-1))
