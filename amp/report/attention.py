"""Where a model looks in a photo for the sake of one triplet or of its state: A^t and A^s as one map a triplet each."""

import torch

from amp.model.clip import ActionAwareCLIP, Prompts
from amp.model.layers.interaction import split_heads
from amp.model.layers.readout import unit


@torch.no_grad()
def attention_maps(model: ActionAwareCLIP, early: torch.Tensor, knowledge) -> dict[str, torch.Tensor]:
    """Attention that each patch of an image gets under each triplet of one caption, alone.

    With ``aim`` this is the mean over rows of A^t and of A^s (eq. 7), how much all patches attend to each; with
    ``readout`` the attention of the triplet's, and of its state's, part of the query, averaged over heads.

    Args:
        model: In eval mode.
        early: Tokens of one image before block `interaction_layer`, (1, F + M, d_v).
        knowledge: `KnowledgeBatch` of one caption.

    Returns:
        ``triplet`` and ``state``, each (K', h, w) for the K' triplets that exist, rows sum to one over h x w; without a
        kind that the model doesn't read, and empty for models without such maps (``cat``, controls).
    """
    if not model.knowledge_aware or model.config.interaction == "cat" or not knowledge.mask.any():
        return {}
    places = knowledge.mask[0].nonzero()[:, 0]
    maps = (
        _of_readout(model, early, knowledge, places) if model.has_readout else _of_aim(model, early, knowledge, places)
    )
    height, width = model.backbone.grid_size
    return {name: x.unflatten(1, (height, width)) for name, x in maps.items()}


def _of_aim(model, early, knowledge, places) -> dict[str, torch.Tensor]:
    prompts: Prompts = model.encode_knowledge(knowledge)
    repeated = prompts.take(torch.zeros_like(places))
    alone = torch.nn.functional.one_hot(places, prompts.mask.shape[1]).bool()
    _, of_triplets, of_states = model.interaction(
        early[:, model.backbone.num_prefix :],
        repeated.triplets,
        repeated.states,
        alone,
        torch.zeros_like(places),
        return_maps=True,
    )
    found = {"triplet": of_triplets, "state": of_states}
    return {name: x.float().mean(dim=1) for name, x in found.items() if x is not None}


def _of_readout(model, early, knowledge, places) -> dict[str, torch.Tensor]:
    readout, queries = model.readout, {}
    _, patches = model.read_patches(early)
    if model.config.reads_triplets:
        queries["triplet"] = readout.query_triplet(model.encode_triplets(knowledge)[:, places])
    if model.config.reads_states:
        queries["state"] = readout.query_text(unit(knowledge.states[:, places], readout.query_text.weight))
    key = split_heads(readout.key(patches), readout.heads)
    found = {}
    for name, query in queries.items():
        query = split_heads(query, readout.heads)
        scores = query @ key.transpose(-2, -1) * query.shape[-1] ** -0.5
        found[name] = scores.float().softmax(dim=-1).mean(dim=1)[0]
    return found
