"""Trains action-aware prompts: stage 1 (contrastive), then stage 2 (triplet loss).

One process:    accelerate launch --config_file launchers/accelerate/one_process.yaml launchers/train.py \
                    --config launchers/configs/flickr30k.yaml
8 GPUs:         accelerate launch --config_file launchers/accelerate/one_node.yaml launchers/train.py --config ...
ZeRO-2:         accelerate launch --config_file launchers/accelerate/one_node.yaml launchers/train.py \
                    --config launchers/configs/coco.yaml --deepspeed ds_configs/zero2.json --stages '[1]'
Plan a run:     amp train --config ... --plan.nodes 8 --plan.gpus 8 --plan.gpu_memory_gb 80
Own photos:     amp train --config photos --data.shards SHARDS --out runs/mine
Paper's recipe: ... --config paper
Control:        ... --prompt.knowledge none --out runs/control
Show settings:  amp train --config ... --print_config; amp train --help

OUT/stage1/adapter.safetensors and OUT/stage2/adapter.safetensors contain only the trained weights. OUT/config.yaml is
the resolved configuration, and OUT/open-clip-amp holds the TensorBoard logs.
"""

import argparse

from amp.command_line import CommandLine
from amp.errors import exit_on_error
from amp.plan.settings import PlanSettings
from amp.train.command import ConfigFile
from amp.train.config import TrainConfig


def parser() -> CommandLine:
    parser = CommandLine(
        usage="%(prog)s [--config FILE] [--KEY VALUE ...]",  # listing all keys would hide the error message
        description=__doc__.split("\n")[0],
    )
    parser.add_argument(
        "--config", action=ConfigFile, help="YAML file, or a recipe (photos, paper); options take precedence"
    )
    parser.add_class_arguments(TrainConfig, as_group=False)
    # Not a setting of the run: unless given, it must not appear in configurations or in OUT/config.yaml.
    parser.add_argument(
        "--plan",
        type=PlanSettings | None,
        nargs="?",
        const={},
        default=argparse.SUPPRESS,
        help="print a plan of the run instead of training; set the machines with keys such as --plan.nodes 8",
    )
    return parser


@exit_on_error("run the same command again to continue from the last checkpoint, if there is one")
def main(arguments: list[str] | None = None) -> None:
    options = parser()
    parsed = options.parse_args(arguments)
    settings = options.instantiate(parsed)
    del settings["config"]
    planned = settings.pop("plan", None)
    config = TrainConfig(**settings)
    config.check()
    if planned is not None:
        from amp.plan.plan import make_plan
        from amp.plan.tables import print_plan
        from amp.terminal import PlainConsole

        with PlainConsole(stderr=True).progress("checking the run"):
            plan = make_plan(config, planned)
        print_plan(plan, PlainConsole())
        raise SystemExit(0 if plan.sound else 2)
    from amp.train.engine import train  # imported after the checks, which don't need it

    train(config)


if __name__ == "__main__":
    main()
