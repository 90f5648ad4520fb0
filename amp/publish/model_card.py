"""Writes the model card of a shared adapter from its header and the result file of an evaluation."""

import html
from typing import Any

import yaml

from amp.evaluate.results import ResultFile
from amp.evaluate.results_table import protocol_lines
from amp.model.adapter import AdapterHeader
from amp.retrieval.metrics import KS

PAPER = "https://arxiv.org/abs/2506.23502"
TAGS = (
    "clip",
    "open_clip",
    "image-text-retrieval",
    "action-aware",
    "sentence-transformers",
    "cross-encoder",
    "reranker",
)


def model_card(header: AdapterHeader, parameters: int, results: ResultFile | None = None) -> str:
    """Returns the model card as Markdown with the hub's YAML header.

    Args:
        header: Header of the adapter file.
        parameters: Number of trained parameters.
        results: Results of an evaluation of the adapter; with None, the card states that there are none.
    """
    config = header.prompt_config
    metadata = {"library_name": "open-clip-amp", "tags": [*TAGS]}
    if header.base_name.startswith("hf-hub:"):
        metadata["base_model"] = header.base_name.removeprefix("hf-hub:")
    base = _text(header.base_name) + (f", weights `{_text(header.base_pretrained)}`" if header.base_pretrained else "")
    knowledge = {
        "none": "none; this is a control, which adapts the base model without knowledge",
        "caption": "only the caption itself",
    }.get(config.knowledge, f"{config.knowledge} (action triplets and state descriptions of the caption)")
    return "\n".join(
        [
            "---",
            yaml.safe_dump(metadata, sort_keys=False).strip(),
            "---",
            "",
            "# Action-aware adapter for an open_clip model",
            "",
            f"{parameters / 1e6:.2f} million trained parameters for the frozen CLIP {base}. The base model pre-selects",
            "candidates. The adapter re-ranks them: it encodes each image conditioned on a caption's knowledge and",
            "scores it against that caption.",
            f"Method: [LLM-enhanced Action-aware Multi-modal Prompt Tuning]({PAPER}). Code: open-clip-amp",
            f"{_text(header.version)}, an independent implementation.",
            "",
            "## Use",
            "",
            "```python",
            "import amp",
            "",
            'model, _, preprocess = amp.from_pretrained("FOLDER")  # or hf-hub:ORG/REPO',
            "```",
            "",
            "```",
            'amp search --index INDEX --photos PHOTOS --adapter FOLDER "a dog jumps over a fence"',
            "```",
            "",
            "With sentence-transformers, which imports a class of open-clip-amp and no code of this repository:",
            "",
            "```python",
            "from sentence_transformers import CrossEncoder",
            "",
            'model = CrossEncoder("FOLDER", trust_remote_code=True)  # or ORG/REPO',
            'ranking = model.rank("a dog jumps over a fence", ["photos/1.jpg", "photos/2.jpg"])',
            "```",
            "",
            f"The base model's weights must have the SHA-256 hash `{header.base_hash}`, computed from names, shapes",
            "and bytes as open_clip loads them. Other weights are rejected.",
            "",
            *_training(header),
            *_results(results),
            "## Limits",
            "",
            "- Image features conditioned on knowledge belong to a pair of image and caption, so they can't be",
            "  computed in advance. Therefore only pre-selected candidates are re-ranked.",
            f"- Knowledge used: {knowledge}. Every query needs its own knowledge, and wrong knowledge is harmful.",
            "- The adapter is specific to the kind of photos and captions that it was trained on. On other data,",
            "  compare it with the base model.",
            "- The adapter inherits the biases of the base model and its training data, and the base model's licence",
            "  applies.",
            "",
        ]
    )


def _training(header: AdapterHeader) -> list[str]:
    record, settings = header.training, header.training.get("config", {})
    if not settings:
        return []
    data, lines = settings.get("data", {}), ["## Training", "", "| setting | value |", "|---|---|"]
    stages = {f"stage {n}": settings.get(f"stage{n}", {}) for n in settings.get("stages", [])}
    rows: dict[str, Any] = {
        "data": data.get("shards"),
        "last stage and its optimizer steps": f"{record.get('stage')}, {record.get('step')}",
        "images per process and step": data.get("batch_size"),
        "conditioning": settings.get("conditioning"),
        **{f"{name}: epochs, peak rate": f"{stage.get('epochs')}, {stage.get('lr')}" for name, stage in stages.items()},
        "prompts": ", ".join(f"{key} {value}" for key, value in vars(header.prompt_config).items()),
        "precision": settings.get("mixed_precision") or "set by the launcher",
        "seed": settings.get("seed"),
    }
    lines += [f"| {name} | {_text(value)} |" for name, value in rows.items()]
    return [*lines, "", "All settings are in `config.json`.", ""]


def _results(results: ResultFile | None) -> list[str]:
    if results is None:
        return ["## Results", "", "Not evaluated. No result file was given when this card was written.", ""]
    names = [f"{direction} R@{k}" for direction in ("i2t", "t2i") for k in KS]
    lines = [f"| | {' | '.join(names)} | Rsum |", "|---|" + "---:|" * (len(names) + 1)]
    for row in results.rows:
        figures = [*row.i2t.recall.values(), *row.t2i.recall.values(), row.rsum]
        lines.append(f"| {_text(row.name)} | {' | '.join(f'{x:.1f}' for x in figures)} |")
    said = [_text(line) for line in protocol_lines(results.protocol)]
    read = "i2t: image queries, captions ranked. t2i: caption queries, images ranked. Evaluated with amp evaluate."
    return ["## Results", "", *said, "", *lines, "", read, ""]


def _text(value: object) -> str:
    """Escapes a value for a line or a table cell, because the hub renders HTML and links in model cards."""
    text = html.escape(" ".join(str(value).split()), quote=False)
    return "".join(f"\\{c}" if c in "|[]`*_" else c for c in text)
