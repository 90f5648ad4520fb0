"""The model card of a shared adapter, written from its header and from an evaluation's result file."""

import html
from typing import Any

import yaml

from amp.evaluate.results import ResultFile
from amp.evaluate.results_table import protocol_lines
from amp.model.adapter import AdapterHeader
from amp.retrieval.metrics import KS

PAPER = "https://arxiv.org/abs/2506.23502"


def model_card(header: AdapterHeader, parameters: int, results: ResultFile | None = None) -> str:
    """The card as Markdown with the hub's YAML header.

    Args:
        header: Header of the adapter file.
        parameters: Number of trained parameters.
        results: Evaluation of the adapter; with None the card says that there is none.
    """
    config = header.prompt_config
    metadata = {"library_name": "open-clip-amp", "tags": ["clip", "open_clip", "image-text-retrieval", "action-aware"]}
    if header.base_name.startswith("hf-hub:"):
        metadata["base_model"] = header.base_name.removeprefix("hf-hub:")
    base = _text(header.base_name) + (f", weights `{_text(header.base_pretrained)}`" if header.base_pretrained else "")
    knowledge = {
        "none": "none: a control, which adapts the base model without knowledge",
        "caption": "the caption alone",
    }.get(config.knowledge, f"{config.knowledge} (action triplets and state descriptions of the caption)")
    return "\n".join(
        [
            "---",
            yaml.safe_dump(metadata, sort_keys=False).strip(),
            "---",
            "",
            "# Action-aware adapter for an open_clip model",
            "",
            f"{parameters / 1e6:.2f} million trained weights around the frozen CLIP {base}. An image is encoded under",
            "the knowledge of a caption and scored against it: the base model pre-selects, the adapter re-ranks.",
            f"Method: [LLM-enhanced Action-aware Multi-modal Prompt Tuning]({PAPER}); code: open-clip-amp",
            f"{_text(header.version)}, which is not the authors'.",
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
            f"The base model's weights must have SHA-256 `{header.base_hash}` (names, shapes and bytes as open_clip",
            "loads them); others are refused.",
            "",
            *_training(header),
            *_results(results),
            "## Limits",
            "",
            "- Features under knowledge belong to a pair of image and caption and can't be stored; only a",
            "  pre-selection is re-ranked.",
            f"- Knowledge used: {knowledge}. Every query needs its own, and wrong knowledge misleads.",
            "- The adapter fits the photos and the wording that it was trained on; on others compare it with the base.",
            "- What the base model was trained on, and its biases and licence, come with it.",
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
        "images a process and step": data.get("batch_size"),
        "conditioning": settings.get("conditioning"),
        **{f"{name}: epochs, peak rate": f"{stage.get('epochs')}, {stage.get('lr')}" for name, stage in stages.items()},
        "prompts": ", ".join(f"{key} {value}" for key, value in vars(header.prompt_config).items()),
        "precision": settings.get("mixed_precision") or "of the launcher",
        "seed": settings.get("seed"),
    }
    lines += [f"| {name} | {_text(value)} |" for name, value in rows.items()]
    return [*lines, "", "All settings are in `config.json`.", ""]


def _results(results: ResultFile | None) -> list[str]:
    if results is None:
        return ["## Results", "", "Not evaluated: no result file was given when this card was written.", ""]
    names = [f"{direction} R@{k}" for direction in ("i2t", "t2i") for k in KS]
    lines = [f"| | {' | '.join(names)} | Rsum |", "|---|" + "---:|" * (len(names) + 1)]
    for row in results.rows:
        figures = [*row.i2t.recall.values(), *row.t2i.recall.values(), row.rsum]
        lines.append(f"| {_text(row.name)} | {' | '.join(f'{x:.1f}' for x in figures)} |")
    said = [_text(line) for line in protocol_lines(results.protocol)]
    read = "i2t: an image asks for captions; t2i: a caption asks for images. Written by amp evaluate."
    return ["## Results", "", *said, "", *lines, "", read, ""]


def _text(value: object) -> str:
    """A value escaped for a line or a table's cell, since the hub renders HTML and links of a card."""
    text = html.escape(" ".join(str(value).split()), quote=False)
    return "".join(f"\\{c}" if c in "|[]`*_" else c for c in text)
