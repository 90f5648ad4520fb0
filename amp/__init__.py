"""open-clip-amp: action-aware multi-modal prompt tuning for open_clip (arXiv 2506.23502).

Heavy imports (torch, open_clip) are deferred until a name is first used, so `import amp` is fast.
"""

from importlib import import_module

from amp.version import __version__

_EXPORTS = {
    "ActionAwareCLIP": "amp.model.clip",
    "AmpError": "amp.errors",
    "Knowledge": "amp.knowledge.schema",
    "KnowledgeBatch": "amp.knowledge.tensors",
    "PromptConfig": "amp.model.config",
    "Reranker": "amp.search.reranker",
    "Retriever": "amp.search.retriever",
    "Triplet": "amp.knowledge.schema",
    "create_model_and_transforms": "amp.model.factory",
    "export_image_encoder": "amp.publish.export",
    "export_onnx": "amp.publish.onnx",
    "from_pretrained": "amp.model.pretrained",
    "get_tokenizer": "amp.model.factory",
    "load_adapter": "amp.model.adapter",
    "open_photo": "amp.data.images.file",
    "push_to_hub": "amp.publish.hub",
    "save_adapter": "amp.model.adapter",
    "save_pretrained": "amp.publish.hub",
}

__all__ = ["__version__", *_EXPORTS]


def __getattr__(name: str):
    if name not in _EXPORTS:
        raise AttributeError(f"module 'amp' has no attribute {name!r}")
    return getattr(import_module(_EXPORTS[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
