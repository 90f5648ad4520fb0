"""Quicker imports of large packages."""

import gc
import importlib
import subprocess
import sys

import pytest
from support.drawn_data import draw
from support.evaluation import make_far_model
from support.repository import QUIET_ENVIRONMENT, ROOT

import amp
from amp.imports import left_out, loading
from amp.model.adapter import save_adapter
from amp.model.needs import needs_transformers


@pytest.mark.parametrize("enabled", [True, False])
def test_collection_pauses_and_then_ignores_what_was_loaded(enabled):
    frozen = gc.get_freeze_count()
    (gc.enable if enabled else gc.disable)()
    try:
        with loading():
            assert not gc.isenabled()
            kept = [[] for _ in range(1000)]
        assert gc.isenabled() == enabled and gc.get_freeze_count() >= frozen + len(kept)
    finally:
        gc.enable()
        gc.unfreeze()


def test_a_package_that_is_left_out_can_be_imported_afterwards(monkeypatch, tmp_path):
    for name in ("heavy", "loaded"):
        (tmp_path / f"{name}.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    loaded = importlib.import_module("loaded")
    with left_out("heavy", "loaded"):
        with pytest.raises(ModuleNotFoundError):
            importlib.import_module("heavy")
        assert importlib.import_module("loaded") is loaded
    assert importlib.import_module("heavy")


@pytest.mark.parametrize(
    ("model", "needed"),
    [
        ("ViT-B-16-quickgelu", False),
        ("ViT-B/32", False),
        ("roberta-ViT-B-32", True),  # a text tower of Hugging Face
        ("ViT-B-16-SigLIP", True),  # a tokenizer of Hugging Face
        ("hf-hub:laion/CLIP-ViT-B-32-laion2B-s34B-b79K", True),
        ("local-dir:/none", True),
        ("no-such-model", True),
    ],
)
def test_which_models_need_transformers(model, needed):
    assert needs_transformers(model, None) == needed


def test_the_adapter_names_the_model(clip_folder, tmp_path):
    model, _ = make_far_model(clip_folder)
    save_adapter(tmp_path / "adapter.safetensors", model)
    for adapter in (tmp_path, tmp_path / "adapter.safetensors"):
        assert not needs_transformers(None, str(adapter))
    model.base_name = "roberta-ViT-B-32"
    save_adapter(tmp_path / "adapter.safetensors", model)
    assert needs_transformers(None, str(tmp_path)) and needs_transformers(None, "/none")


def test_a_search_imports_neither_transformers_nor_spacy(clip_folder, tmp_path):
    """In a new process, with rules and an adapter."""
    pytest.importorskip("spacy", reason='needs spaCy: pip install "open-clip-amp[generate]"')
    model, preprocess = make_far_model(clip_folder)
    save_adapter(tmp_path / "adapter.safetensors", model)
    (tmp_path / "photos").mkdir()
    draw(1).save(tmp_path / "photos" / "dog.png")
    amp.Retriever(amp.Reranker(model, preprocess), tmp_path / "index").update(tmp_path / "photos", workers=0)
    code = (
        "import sys; from amp.commands.search import main\n"
        f"main(['--index', '{tmp_path}/index', '--adapter', '{tmp_path}/adapter.safetensors', 'A dog chases a ball'])\n"
        "print(*(name for name in ('torch', 'transformers', 'spacy', 'matplotlib') if name in sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=QUIET_ENVIRONMENT, text=True, capture_output=True)
    *_, found, loaded = done.stdout.splitlines()
    assert "dog.png" in found and loaded == "torch", done.stderr
    assert "<dog, chases, ball>" in done.stdout
