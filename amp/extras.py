"""Optional packages, and the extra that installs each of them."""

INSTALLED_BY = {
    "accelerate": "open-clip-amp[train]",
    "deepspeed": "open-clip-amp[train]",
    "psutil": "open-clip-amp[train]",
    "tensorboard": "open-clip-amp[train]",
    "webdataset": "open-clip-amp[train]",
    "braceexpand": "open-clip-amp[train]",
    "gguf": "open-clip-amp[generate]",
    "llguidance": "open-clip-amp[generate]",
    "openai": "open-clip-amp[generate]",
    "snowballstemmer": "open-clip-amp[generate]",
    "spacy": "open-clip-amp[generate]",
    "tenacity": "open-clip-amp[generate]",
    "sentencepiece": "open-clip-amp[transformers]",
    "transformers": "open-clip-amp[transformers]",
    "onnx": "open-clip-amp[onnx]",
    "onnxruntime": "open-clip-amp[onnx]",
    "onnxscript": "open-clip-amp[onnx]",
    "matplotlib": "open-clip-amp[report]",
    "fastapi": "open-clip-amp[serve]",
    "uvicorn": "open-clip-amp[serve]",
    "prometheus_client": "open-clip-amp[serve]",
    "fsspec": "open-clip-amp[remote]",
    "s3fs": "open-clip-amp[remote]",
    "gcsfs": "open-clip-amp[remote]",
    "aiohttp": "open-clip-amp[remote]",
    "datasets": "open-clip-amp[datasets]",
    "pyarrow": "open-clip-amp[datasets]",
    "pillow_heif": "open-clip-amp[heic]",
    "clip_benchmark": "clip-benchmark",
    "vllm": "vllm",
}


def missing(error: ImportError, who: str = "this") -> str | None:
    """The message for a failed import, on one line: what is missing and how to install it.

    Args:
        error: The error of the import.
        who: What needs the package, such as `the rules`.

    Returns:
        The message; None if the package is not one of `INSTALLED_BY`.
    """
    package = (error.name or "").partition(".")[0]
    if package not in INSTALLED_BY:
        return None
    return f"{who} can't work without the package {package} ({error}); {pip_install(package)}"


def pip_install(package: str) -> str:
    """The command that installs an optional package."""
    return f'pip install "{INSTALLED_BY[package]}"'
