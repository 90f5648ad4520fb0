"""ONNX graphs run by onnxruntime, compared with the model, its `PairScorer` and its re-ranker."""

import json
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from support.models import aim_settings, shake
from support.repository import ROOT
from support.timm_towers import make_timm_model

import amp
from amp.publish.graphs import CAPTION_INPUTS
from amp.retrieval.scorer import PairScorer

onnxruntime = pytest.importorskip("onnxruntime")

READOUT = {"depth": 1 / 3, "num_prompts": 4}
TEXTS = ["a dog jumps", "a small girl studies", "", "eight men chase horses"]


def native(clip_folder: str, **settings) -> amp.ActionAwareCLIP:
    """A model with random weights around the tiny CLIP, as if trained."""
    model, _, _ = amp.create_model_and_transforms(clip_folder, prompt_config=amp.PromptConfig(**settings))
    shake(model, generator=torch.Generator().manual_seed(2))
    return model.eval()


class Graphs:
    """The graphs of a folder, with torch tensors as inputs and outputs."""

    def __init__(self, folder):
        self.sessions = {
            name: onnxruntime.InferenceSession(folder / f"{name}.onnx") for name in ("image", "text", "pair")
        }

    def __call__(self, name: str, inputs: dict[str, torch.Tensor]) -> list[torch.Tensor]:
        found = self.sessions[name].run(None, {key: value.numpy() for key, value in inputs.items()})
        return [torch.from_numpy(x) for x in found]


@pytest.fixture(scope="module")
def documented(clip_folder, tmp_path_factory):
    """Folder in which docs/sharing.md's export was run for a published adapter, its names, and its second script."""
    folder = tmp_path_factory.mktemp("documented")
    page = (ROOT / "docs/sharing.md").read_text()
    export, score = (
        re.findall(rf"^```python\n# {name}\.py\n(.*?)^```", page, re.DOTALL | re.MULTILINE)[0]
        for name in ("export", "score")
    )
    names: dict = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        amp.save_adapter("adapter.safetensors", native(clip_folder, **READOUT))
        amp.save_pretrained("models/mine", "adapter.safetensors")
        exec(compile(export, "export.py", "exec"), names)
    return folder, names, score


@pytest.mark.system
def test_graphs_give_the_scores_of_the_model(documented, images, knowledge):
    folder, names, _ = documented
    compare(names["model"], folder / "graphs", images, knowledge)


@pytest.mark.slow  # exports take some ten seconds each
@pytest.mark.parametrize(
    ("tower", "settings"),
    [
        pytest.param(None, {**READOUT, "interaction_options": {"blocks": 0}}, id="readout-0"),
        pytest.param(None, aim_settings(enrich=True), id="aim"),
        pytest.param(None, aim_settings(interaction="cat"), id="cat"),
        pytest.param(None, {**READOUT, "knowledge": "none"}, id="control"),
        pytest.param(None, {**READOUT, "interaction": "visual_prompts"}, id="visual-prompts"),
        pytest.param("siglip", aim_settings(block=1, enrich=True), id="siglip"),
        pytest.param("eva02", READOUT, id="eva02"),
    ],
)
def test_graphs_of_every_kind_give_the_scores_of_the_model(tower, settings, clip_folder, images, knowledge, tmp_path):
    model = native(clip_folder, **settings) if tower is None else make_timm_model(tower, True, **settings).eval()
    compare(model, amp.export_onnx(model, tmp_path / "graphs"), images, knowledge)


def compare(model, folder, images, knowledge) -> None:
    """For other numbers of images, captions, pairs and tokens than those of the export's examples."""
    graphs = Graphs(folder)
    tokens, batch = model.tokenizer(TEXTS), model.prepare_knowledge(knowledge)
    for count, captions in ((4, 4), (1, 1), (3, 1), (1, 3), (2, 3)):
        with torch.no_grad():
            first, text = model(images[:count]), model.backbone.clip.encode_text(tokens[:captions])
            scorer = PairScorer(model, first.early, batch[:captions], text)
        base, *parts = graphs("image", {"pixels": images[:count]})
        (features,) = graphs("text", {"tokens": tokens[:captions]})
        torch.testing.assert_close(base, first.base, atol=1e-4, rtol=0)
        torch.testing.assert_close(features, text, atol=1e-4, rtol=0)
        pairs = torch.cartesian_prod(torch.arange(count), torch.arange(captions)).T.contiguous()
        inputs = dict(zip(CAPTION_INPUTS, (*vars(batch[:captions]).values(), features), strict=True))
        inputs |= {"image_index": pairs[0], "caption_index": pairs[1]}
        (scores,) = graphs("pair", inputs | {f"part_{n}": part for n, part in enumerate(parts)})
        torch.testing.assert_close(scores, scorer(*pairs), atol=1e-4, rtol=0)
        assert count * captions < 3 or scores.std() > 1e-3
    if model.backbone.cuts_padding:
        (cut,) = graphs("text", {"tokens": tokens[:, : int(tokens.argmax(1).max()) + 1]})
        assert cut.shape[0] == 4
        torch.testing.assert_close(cut, model.backbone.clip.encode_text(tokens).detach(), atol=1e-4, rtol=0)


@pytest.mark.system
def test_int8_graphs_are_smaller_and_close(clip_folder, images, tmp_path):
    model = native(clip_folder, **READOUT)
    folder = amp.export_onnx(model, tmp_path / "graphs", int8=True)
    names = [f"{name}.onnx{ending}" for name in ("image", "pair", "text") for ending in ("", ".data")]
    assert sorted(file.name for file in folder.iterdir()) == sorted([*names, "preprocess.json"])
    assert len({file.stat().st_mode for file in folder.iterdir()}) == 1
    graphs, clip, tokens = Graphs(folder), model.backbone.clip, model.tokenizer(TEXTS)
    text_weights = [weight for name, weight in clip.named_parameters() if not name.startswith("visual.")]
    with torch.no_grad():
        cases = {
            "image": ({"pixels": images}, clip.encode_image(images), clip.visual.parameters()),
            "text": ({"tokens": tokens}, clip.encode_text(tokens), text_weights),
        }
    for name, (inputs, exact, weights) in cases.items():
        assert (folder / f"{name}.onnx.data").stat().st_size < 0.6 * sum(weight.nbytes for weight in weights)
        close = graphs(name, inputs)[0]
        assert not torch.equal(exact, close)
        assert torch.cosine_similarity(exact, close).min() > 0.995  # 0.97 where sums saturate


def test_a_folder_is_not_replaced(clip_folder, tmp_path):
    with pytest.raises(amp.AmpError, match="exists already; give a new folder"):
        amp.export_onnx(native(clip_folder, **READOUT), tmp_path)


def test_weights_in_low_precision_are_refused(clip_folder, tmp_path):
    model, _, _ = amp.create_model_and_transforms(clip_folder, precision="bf16")
    with pytest.raises(amp.AmpError, match=r"bfloat16, expected torch\.float32"):
        amp.export_onnx(model, tmp_path / "graphs")


def test_a_missing_package_is_named(clip_folder, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(amp.AmpError, match=r'pip install "open-clip-amp\[onnx\]"'):
        amp.export_onnx(native(clip_folder, **READOUT), tmp_path / "graphs")


@pytest.mark.system
def test_the_documented_example_ranks_like_the_reranker_without_torch(documented, monkeypatch):
    folder, names, score = documented
    monkeypatch.chdir(folder)
    (folder / "photos").mkdir()
    random = np.random.default_rng(0)
    for number in range(5):
        content = random.integers(0, 255, (4, 6, 3), np.uint8)
        Image.fromarray(content).resize((60, 40)).save(f"photos/{number}.jpg")
    hidden = "import sys; sys.modules.update(dict.fromkeys(('torch', 'open_clip', 'amp')))\n"
    shown = subprocess.run(
        [sys.executable, "-c", f"{hidden}{score}\nprint(json.dumps(scores.tolist()))"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.splitlines()
    model, _, preprocess = amp.from_pretrained("models/mine")
    photos = sorted(folder.glob("photos/*.jpg"))
    ranking = amp.Reranker(model, preprocess).rank(names["caption"], photos, knowledge=names["knowledge"])
    expected = {found["corpus_id"]: found["score"] for found in ranking}
    scores = json.loads(shown[-1])
    assert scores == pytest.approx([expected[n] for n in range(5)], abs=1e-4)
    assert max(scores) - min(scores) > 1e-3
    assert [line.split()[1] for line in shown[:-1]] == [f"photos/{found['corpus_id']}.jpg" for found in ranking]
