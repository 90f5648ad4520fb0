"""Exports a model as ONNX graphs, which onnxruntime runs without torch and without this package."""

import json
import logging
import os
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

from amp.errors import AmpError, require
from amp.folders import build_folder
from amp.model.clip import ActionAwareCLIP
from amp.publish.graphs import (
    CAPTION_INPUTS,
    CAPTIONS,
    IMAGES,
    PAIRS,
    ImageGraph,
    PairGraph,
    Sizes,
    TextGraph,
    example_captions,
    example_images,
    example_tokens,
    export_graph,
)


def export_onnx(model: ActionAwareCLIP, folder: str | os.PathLike, int8: bool = False) -> Path:
    """Writes the graphs `image.onnx`, `text.onnx` and `pair.onnx`, each with a file of weights, to a new folder.

    Their inputs and outputs are those of `ImageGraph`, `TextGraph` and `PairGraph`, with dynamic batch sizes. The
    folder also contains `preprocess.json`, open_clip's settings of the image transform.

    Args:
        model: Model in eval mode with fp32 weights.
        folder: Folder to create.
        int8: Quantize the weights of matrix products and embeddings to 8 bits, with onnxruntime's dynamic quantization.

    Returns:
        The folder.

    Raises:
        AmpError: A package is missing, the weights are not fp32, or the folder exists or can't be created.
    """
    for package in ("onnx", "onnxscript", "onnxruntime"):
        require(package, "the export to ONNX")
    if model.backbone.dtype != torch.float32:
        raise AmpError(
            f"the base model's weights are {model.backbone.dtype}, expected torch.float32; load the model with "
            "precision='fp32', and set int8=True for smaller graphs"
        )
    folder = Path(folder)
    if folder.exists():
        raise AmpError(f"{folder}: exists already; give a new folder, or remove this one")
    device, pixels = model.logit_scale.device, example_images(model)
    tokens, texts = example_tokens(model)
    with torch.no_grad():
        _, *parts = ImageGraph(model)(pixels)
    names = [f"part_{number}" for number in range(len(parts))]
    index = {name: torch.zeros(5, dtype=torch.int64, device=device) for name in ("image_index", "caption_index")}
    captions = dict(zip(CAPTION_INPUTS, example_captions(model), strict=True))
    pairs = {**captions, **index, **dict(zip(names, parts, strict=True))}
    sizes = [CAPTIONS] * len(captions) + [PAIRS] * len(index) + [IMAGES] * len(parts)
    with build_folder(folder) as temporary:
        write_graph(temporary / "image.onnx", ImageGraph(model), {"pixels": pixels}, [IMAGES], ["base", *names], int8)
        write_graph(temporary / "text.onnx", TextGraph(model), {"tokens": tokens}, [texts], ["features"], int8)
        write_graph(temporary / "pair.onnx", PairGraph(model), pairs, sizes, ["scores"], int8)
        preprocess = model.backbone.visual.preprocess_cfg
        (temporary / "preprocess.json").write_text(json.dumps(preprocess, indent=1) + "\n", encoding="utf-8")
    return folder


def write_graph(
    path: Path, module: nn.Module, inputs: dict[str, Tensor], sizes: Sequence[Sizes], outputs: Sequence[str], int8: bool
) -> None:
    """Writes a graph and, next to it, its weights as `NAME.onnx.data`.

    Args:
        path: File of the graph.
        module: Module to export.
        inputs: Example inputs by name.
        sizes: The dynamic dimensions of each input.
        outputs: Names of the outputs.
        int8: Whether to quantize the weights.
    """
    program = export_graph(module, list(inputs.values()), sizes)
    with quiet():
        exported = torch.onnx.export(
            program,
            input_names=list(inputs),
            output_names=outputs,
            dynamic_shapes=list(sizes),  # only for their names
            dynamo=True,
            verbose=False,
        )
        assert exported is not None
        if not int8:
            exported.save(path, external_data=True)
            return
        from onnxruntime.quantization import QuantType, quantize_dynamic
        from onnxruntime.quantization.shape_inference import quant_pre_process

        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            fp32, folded = Path(folder) / "fp32.onnx", Path(folder) / "folded.onnx"
            exported.save(fp32, external_data=True)
            # Folds constants, such as transposed weights, which otherwise would not be quantized.
            quant_pre_process(
                fp32,
                folded,
                skip_symbolic_shape=True,
                save_as_external_data=True,
                all_tensors_to_one_file=True,
                external_data_location="folded.data",
            )
            quantize_dynamic(
                folded,
                path,
                op_types_to_quantize=["MatMul", "Gemm", "Gather"],
                per_channel=True,
                reduce_range=True,  # 8 bits overflow on processors without VNNI instructions
                weight_type=QuantType.QInt8,
                use_external_data_format=True,
            )
            path.with_name(f"{path.name}.data").chmod(path.stat().st_mode)  # onnxruntime writes it for its owner only


@contextmanager
def quiet() -> Iterator[None]:
    """Hides warnings that concern developers of the exporters, such as shared names of dimensions."""
    before = logging.root.manager.disable
    with warnings.catch_warnings(action="ignore"):
        logging.disable(logging.WARNING)
        try:
            yield
        finally:
            logging.disable(before)
