"""A training step of each conditioning, compared with the frozen CLIP, plain prompt tuning and a naive implementation.

Measures images per second of forward and backward passes. The output of the blocks before the first prompted one can be
stored, so these blocks are only included for the frozen CLIP and for the naive implementation, which stores nothing.
"""

import contextlib
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch.utils.flop_counter import FlopCounterMode

from amp.model.adapter import save_adapter
from amp.model.clip import ActionAwareCLIP
from amp.model.similarity import similarity
from amp.train.losses import contrastive_loss, same_image_mask
from amp.train.objective import Objective
from amp.train.stages import set_trainable
from amp.train.trained_state import MOMENTS
from benchmarks.memory import kept_bytes
from benchmarks.models import READ_LAST, base_model, build, drawn_captions, random_batch
from benchmarks.naive import NaiveAIM, plain_prompt_tuning
from benchmarks.settings import Settings
from benchmarks.tables import spread, table
from benchmarks.timing import in_turns, medians, ratio, rounded

NEGATIVES = 2
FROZEN, PLAIN, NAIVE = "frozen CLIP, forward only", "plain prompt tuning", "contrastive m=2, naive"
CONTROL, PAIRED, AIM = "control", "paired, aim", "contrastive m=2, aim"
READOUT = "contrastive all pairs, readout"


def run(settings: Settings) -> dict:
    """Measures every method at l = 0, L/2 and 3L/4, and the sizes of weights and files."""
    base = base_model(settings)
    depth, found = base.backbone.num_layers, {}
    for layer in (0, depth // 2, 3 * depth // 4):
        found[str(layer)] = at_layer(base, layer, settings)
    trained = {
        name: sizes(build(base, depth // 2, **prompt)) for name, prompt in {"aim": {}, "readout": READ_LAST}.items()
    }
    return {
        "blocks": depth,
        "images": settings.step_batch,
        "patches": base.backbone.num_patches,
        "layers": found,
        "sizes": trained,
    }


def at_layer(base: ActionAwareCLIP, layer: int, settings: Settings, **prompt) -> dict:
    """Measures speed, work and memory of all methods.

    Args:
        base: Base model.
        layer: First prompted block.
        settings: Settings of the benchmarks.
        **prompt: More settings of `PromptConfig`.
    """
    ways = ways_at(base, layer, settings, prompt)
    counted = {name: counted_work(way, model or base) for name, (way, model) in ways.items()}
    rates = in_turns({name: way for name, (way, _) in ways.items()}, settings.model_rounds, settings.device, warm=False)
    rows = {}
    for name, figures in medians(rates).items():
        items, work, kept = counted[name]
        work /= items
        rows[name] = {
            "images_per_second": figures,
            "gflop_per_image": rounded(work),
            "gflop_per_second": rounded(figures["median"] * work),
        }
        if name not in (FROZEN, NAIVE):
            rows[name]["kept_MB_per_image"] = rounded(kept / 1e6 / items)
    rows[CONTROL]["kept_MB_by_hand"] = rounded(kept_by_hand(ways[CONTROL][1]) / 1e6)
    against = {f"{name} / {PLAIN}": ratio(rates, PLAIN, name) for name in (CONTROL, PAIRED, AIM, READOUT)}
    against |= {f"{NAIVE} / {name}": ratio(rates, name, NAIVE) for name in (AIM, READOUT)}
    return {"rows": rows, "times_as_long": {name: rounded(x) for name, x in against.items()}}


def ways_at(
    base: ActionAwareCLIP, layer: int, settings: Settings, prompt: dict
) -> dict[str, tuple[Callable, ActionAwareCLIP | None]]:
    """Returns each method by name, with the model whose memory is counted."""
    size, device = settings.step_batch, settings.device
    images = torch.randn(size, 3, *base.backbone.visual.image_size, device=device)
    control = build(base, layer, knowledge="none")
    aim, readout = build(base, layer, **prompt), build(base, layer, **READ_LAST, **prompt)
    batch = random_batch(aim, size)

    def frozen() -> int:
        with torch.no_grad(), low_precision(device):
            base.backbone.clip.encode_image(images)
        return size

    def plain() -> int:
        with low_precision(device):
            features = plain_prompt_tuning(control, images, batch.images)
        cosines = similarity(features, batch.text)
        scale = control.logit_scale.exp()
        contrastive_loss(cosines, scale, same_image_mask(batch.image_ids)).backward()
        control.zero_grad()
        return size

    def ours(model: ActionAwareCLIP, conditioning: str = "contrastive") -> Callable[[], int]:
        objective = Objective(1, model.interaction, conditioning, NEGATIVES)

        def step() -> int:
            with low_precision(device):
                loss, _ = objective(model, batch, 0)
            loss.backward()
            model.zero_grad()
            return size

        return step

    for model in (control, aim, readout):
        set_trainable(model, 1)
    naive, few = NaiveAIM(aim), min(size, 1 + NEGATIVES)
    captions, items = drawn_captions(few, aim.config.max_triplets)

    def slow() -> int:
        drawn = [[(n + j) % few for j in range(1, few)] for n in range(few)]
        naive.contrastive_step(images[:few], captions, items, drawn, 1.0).backward()
        aim.zero_grad()
        return few

    return {
        FROZEN: (frozen, None),
        PLAIN: (plain, control),
        CONTROL: (ours(control), control),
        PAIRED: (ours(aim, "paired"), aim),
        AIM: (ours(aim), aim),
        READOUT: (ours(readout), readout),
        NAIVE: (slow, None),
    }


def kept_by_hand(model: ActionAwareCLIP) -> float:
    """Returns the minimum bytes per image that autograd keeps of frozen fp32 blocks with deep visual prompts.

    A block needs 10 d numbers per token: the inputs of both norms (2 d), query, key, value and the attention output
    (4 d), and the input of the GELU (4 d). The last block computes only the class token; it needs the input of its
    first norm, and the keys and values of all tokens (3 d). The statistics of norms and attention, a few numbers per
    token, are not counted. The inputs of linear maps are not needed, because their weights are frozen.
    """
    config, backbone = model.config, model.backbone
    tokens = backbone.num_tokens + config.num_prompts
    blocks = backbone.num_layers - model.tower.first
    return 4 * backbone.vision_width * tokens * (10 * (blocks - 1) + 3)


def sizes(model: ActionAwareCLIP) -> dict[str, float]:
    """Returns MB of all weights, trained weights, an adapter file, and a checkpoint with AdamW's two moments."""
    set_trainable(model, 1)
    trained = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    with tempfile.TemporaryDirectory() as folder:
        adapter, moments = Path(folder) / "adapter.safetensors", Path(folder) / "optimizer.safetensors"
        model.base_name, model.base_pretrained, model.base_hash = "", None, "0" * 64  # otherwise set by the factory
        save_adapter(adapter, model)
        save_file({f"{m}.{name}": torch.zeros_like(p) for name, p in trained.items() for m in MOMENTS}, moments)
        written = [path.stat().st_size for path in (adapter, moments)]
    bytes_of = {"all_MB": model.parameters(), "trained_MB": trained.values()}
    found = {key: sum(p.nbytes for p in parameters) for key, parameters in bytes_of.items()}
    found |= {"adapter_MB": written[0], "checkpoint_MB": sum(written)}
    return {key: rounded(value / 1e6) for key, value in found.items()}


def low_precision(device: str) -> contextlib.AbstractContextManager:
    """Returns bf16 autocast on a GPU, as in training; fp32 on the CPU, because most processors have no bf16 units."""
    return torch.autocast("cuda", torch.bfloat16) if torch.device(device).type == "cuda" else contextlib.nullcontext()


def counted_work(way: Callable[[], int], model: ActionAwareCLIP) -> tuple[int, float, int]:
    """Returns the images of a step, its GFLOP, and the bytes that autograd keeps."""
    found = []
    work = gflop(lambda: found.extend(kept_bytes(model, way)))
    return found[0], work, found[1]


def gflop(work: Callable[[], object]) -> float:
    """Counts the matrix products of a call in GFLOP, including attention."""
    with FlopCounterMode(display=False) as counter:
        work()
    return counter.get_total_flops() / 1e9


def steps(figures: dict) -> list[str]:
    peak, rows = figures["machine"]["matmul_GFLOP_per_second"]["fp32"], []
    for layer, found in figures["layers"].items():
        times = found["times_as_long"]
        for name, row in found["rows"].items():
            rate, share = row["images_per_second"], row["gflop_per_second"] / peak
            rows.append(
                [
                    layer,
                    name,
                    spread(rate),
                    times.get(f"{name} / plain prompt tuning"),
                    times.get(f"contrastive m=2, naive / {name}"),
                    row["gflop_per_image"],
                    f"{share:.0%}",
                    row.get("kept_MB_per_image"),
                    row.get("kept_MB_by_hand"),
                ]
            )
    return table(
        [
            "l",
            "",
            "images/s",
            "time relative to plain",
            "time of naive, relative",
            "GFLOP per image",
            "share of peak",
            "MB kept per image",
            "MB kept, by hand",
        ],
        rows,
    )


def sizes_table(figures: dict) -> list[str]:
    rows = ([name, *found.values()] for name, found in figures["sizes"].items())
    return table(["interaction", "all weights, MB", "trained, MB", "adapter file, MB", "checkpoint, MB"], rows)


TABLES = {"step": steps, "step.sizes": sizes_table}
