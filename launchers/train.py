"""Trains action-aware prompts: stage 1 (contrastive), then stage 2 (triplet loss).

One process:   accelerate launch --config_file launchers/accelerate/one_process.yaml launchers/train.py \
                   --config launchers/configs/flickr30k_vit_b16.yaml
8 GPUs:        accelerate launch --config_file launchers/accelerate/one_node.yaml launchers/train.py --config ...
ZeRO-2:        accelerate launch --config_file launchers/accelerate/one_node.yaml --use_deepspeed \
                   --deepspeed_config_file ds_configs/zero2.json launchers/train.py \
                   --config launchers/configs/coco_vit_l14_336.yaml --stages '[1]'
The control:   ... --conditioning none --prompt.knowledge none --out runs/control
What is set:   python launchers/train.py --config ... --print_config; python launchers/train.py --help

OUT/stage1/adapter.safetensors and OUT/stage2/adapter.safetensors hold the new weights only; OUT/config.yaml the
resolved configuration; OUT/open-clip-amp the TensorBoard logs.
"""

import os
from pathlib import Path

from jsonargparse import ArgumentParser

from amp.errors import exit_on_error
from amp.train.config import TrainConfig


def parser() -> ArgumentParser:
    parser = ArgumentParser(
        prog="launchers/train.py",
        usage="launchers/train.py [--config FILE] [--KEY VALUE ...]",  # the keys would bury an error's line
        description=__doc__.split("\n")[0],
    )
    parser.add_argument("--config", action="config", help="YAML file; keys on the command line win")
    parser.add_class_arguments(TrainConfig, as_group=False)
    return parser


def main(arguments: list[str] | None = None) -> None:
    options = parser()
    parsed = options.parse_args(arguments)
    with exit_on_error():
        settings = options.instantiate(parsed)
        del settings["config"]
        config = TrainConfig(**settings)
        config.check()
        if os.environ.get("RANK", "0") == "0":
            Path(config.out).mkdir(parents=True, exist_ok=True)
            del parsed["config"]
            # Nulls too: left out, they would be read back as the defaults.
            options.save(parsed, Path(config.out) / "config.yaml", overwrite=True, skip_unset=False)
        from amp.train.engine import train  # after the checks, which need none of its imports

        train(config)


if __name__ == "__main__":
    main()
