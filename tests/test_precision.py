"""Dtypes of frozen weights and autocast: each pair works, or training, evaluation and the plan refuse it."""

from dataclasses import replace
from itertools import product

import pytest
import torch
import torch.nn.functional as F
from support.models import aim_settings, make_model
from support.training_run import small_run

from amp.errors import AmpError
from amp.evaluate.run import evaluate
from amp.evaluate.settings import BaseSettings, EvaluationSettings
from amp.knowledge.tensors import Captions
from amp.launch import precision_problems
from amp.model.config import PromptConfig
from amp.model.factory import to_precision
from amp.plan.launch import check_launch
from amp.plan.plan import PlanSettings, make_plan
from amp.publish.export import export_image_encoder
from amp.report.attention import attention_maps
from amp.retrieval.figures import BASE
from amp.retrieval.settings import RetrievalSettings
from amp.train.config import StageSettings
from amp.train.engine import train

PROMPTS = {
    "aim": {**aim_settings(), "enrich": True},
    "cat": aim_settings(interaction="cat"),
    "readout": {"interaction_options": {"blocks": 0}},
    "readout with a block": {},
    "control": {"interaction": "visual_prompts"},
    "readout's control": {"knowledge": "none"},
}


@pytest.mark.parametrize(
    ("precision", "name"), [*(("bf16", name) for name in PROMPTS), ("fp16", "aim"), ("fp16", "readout")]
)
def test_a_backbone_in_low_precision_needs_no_autocast(precision, name, images, knowledge):
    """Features and gradients are close to those of fp32."""
    found, prompt = [], PROMPTS[name]
    for kind in ("fp32", precision):
        model = make_model(trained=True, **prompt).eval()
        to_precision(model.backbone.clip, kind)
        text = model.encode_text(model.tokenizer(["a dog jumps", "a girl", "nothing", "men chase horses"]))
        captions = Captions(model.prepare_knowledge(knowledge), text)
        features = model(images, captions, plain=torch.arange(4))
        parts = [model.encode_image(images), features.plain, features.captions.text, features.conditioned]
        maps = attention_maps(model, model.tower.early(images[:1]), model.prepare_knowledge(knowledge[1:2]))
        assert all(x.isfinite().all() for x in maps.values()) and bool(maps) == (
            prompt.get("interaction") == "aim" or not {"interaction", "knowledge"} & set(prompt)
        )
        loss = torch.stack([F.normalize(part.float(), dim=-1).sum() for part in parts[1:]]).sum()
        loss.backward()
        trained = {n: p.grad for n, p in model.named_parameters() if not n.startswith("backbone.") and p.numel()}
        assert all(grad is None or (grad.dtype == torch.float32 and grad.isfinite().all()) for grad in trained.values())
        found.append([F.normalize(part.detach().float(), dim=-1) for part in parts])
    for exact, low in zip(*found, strict=True):
        assert 0 <= float((exact - low).abs().max()) < 0.05


def test_a_backbone_in_low_precision_can_be_exported(images, knowledge):
    model = make_model().eval()
    to_precision(model.backbone.clip, "bf16")
    program, batch = export_image_encoder(model), model.prepare_knowledge(knowledge)
    text = model.encode_text(model.tokenizer(["a dog", "a girl", "nothing", "men"]))
    given = (images, batch.triplet_tokens, batch.token_mask, batch.states.float(), batch.mask, text.float())
    with torch.no_grad():
        torch.testing.assert_close(
            program.module()(*given), model(images, Captions(batch, text)).conditioned, rtol=0, atol=0.02
        )


@pytest.fixture
def config(shards, clip_folder, tmp_path, fresh_accelerate):
    """One step per stage, then a validation."""
    one = StageSettings(max_steps=1)
    config = small_run(
        shards,
        clip_folder,
        tmp_path,
        {"batch_size": 4, "val_split": "val"},
        stage1=one,
        stage2=one,
    )
    return replace(config, prompt=PromptConfig(depth=1 / 3, num_prompts=2))


def plan_errors(config) -> list[str]:
    return [text for level, check, text in make_plan(config, PlanSettings()).findings if level == "error"]


def test_low_precision_trains_and_is_evaluated(config, tmp_path):
    """In bf16. fp16 uses the same code, and its features and gradients are tested above."""
    config = replace(config, model=replace(config.model, precision="bf16"), mixed_precision="no")
    assert plan_errors(config) == []
    adapter = train(config)
    settings = EvaluationSettings(
        adapters=[f"mine={adapter}"],
        model=BaseSettings(precision="bf16"),
        search=RetrievalSettings(top_k=3),
        bootstrap=0,
        cache=config.data.cache,
        workers=0,
        mixed_precision="no",
        out=tmp_path / "out.json",
    )
    rows = evaluate(settings).result.rows
    assert rows[0].key == BASE and len(rows) > 1


def test_two_low_types_are_refused_before_anything_is_computed(config, tmp_path, monkeypatch):
    monkeypatch.setattr("amp.train.engine.open_splits", None)
    monkeypatch.setattr("amp.evaluate.run.load_base", None)
    config = replace(config, model=replace(config.model, precision="fp16"), mixed_precision="bf16")
    words = "model.precision is 'fp16' and autocast .* is 'bf16'.*--mixed_precision no"
    with pytest.raises(AmpError, match=words):
        train(config)
    with pytest.raises(AmpError, match=words):
        evaluate(
            EvaluationSettings(config.data.shards, model=BaseSettings("x", precision="fp16"), mixed_precision="bf16")
        )


def test_what_is_refused(config, monkeypatch):
    """All pairs, on a processor without bf16 instructions. The plan, which is for GPUs, agrees."""
    monkeypatch.setattr("amp.launch.multiplies_bf16", lambda: False)
    low = {"bf16", "fp16"}
    for weights, autocast, gpu, file in product(("fp32", *low), ("auto", "no", *low), (True, False), (None, "zero2")):
        run = replace(config, model=replace(config.model, precision=weights), mixed_precision=autocast, stages=[1])
        chosen = {"auto": "bf16" if gpu else "no"}.get(autocast, autocast)
        refused = {weights, chosen} == low and not (file and chosen == "fp16")
        no_gpu = chosen == "fp16" and not gpu and not file
        assert bool(list(precision_problems(run, file, gpu))) == (refused or no_gpu)
        if gpu:
            said = [f.text for f in check_launch(run, 1, 1, chosen, file) if f.level == "error"]
            assert [("model.precision" in text) for text in said] == [True] * refused
