"""Computes the stored features of a training run before it starts: texts and photos, shard by shard.

    amp prepare --config launchers/configs/coco.yaml

Takes the options of amp train, which otherwise does the same work first. Start it as often as you have machines or
GPUs, for example as a job array (launchers/slurm/prepare.sbatch): the processes share the work by files in data.cache,
and a process that ends early is replaced by the others. Running it again does only what is missing.
"""

import os

from amp.command_line import CommandLine
from amp.errors import exit_on_error
from amp.train.command import ConfigFile
from amp.train.config import TrainConfig

SHARES = (("RANK", "WORLD_SIZE"), ("SLURM_ARRAY_TASK_ID", "SLURM_ARRAY_TASK_COUNT"), ("SLURM_PROCID", "SLURM_NTASKS"))
"""Environment variables that number the processes of a launcher, a job array or a job step."""


def parser() -> CommandLine:
    parser = CommandLine(usage="%(prog)s [--config FILE] [--KEY VALUE ...]", description=__doc__.split("\n")[0])
    parser.add_argument("--config", action=ConfigFile, help="YAML file, or a recipe; options take precedence")
    parser.add_class_arguments(TrainConfig, as_group=False)
    return parser


@exit_on_error("finished shards are kept; run the same command again to continue")
def main(arguments: list[str] | None = None) -> None:
    options = parser()
    settings = options.instantiate(options.parse_args(arguments))
    del settings["config"]
    config = TrainConfig(**settings)
    config.check()
    # Imported after the checks, which don't need them.
    import torch

    from amp.cores import use_cores
    from amp.device import usable_device
    from amp.model.factory import create_model_and_transforms
    from amp.terminal import Terminal
    from amp.train.features import Features
    from amp.train.run import open_splits

    terminal = Terminal(True)
    split, val_split = open_splits(config)
    local = os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID"))
    device = usable_device()
    if device.type == "cuda" and local is not None:
        # A task that has one GPU to itself sees it as number 0.
        device = usable_device(f"cuda:{int(local) % torch.cuda.device_count()}")
    use_cores(config.data.workers, device.type == "cuda")
    with terminal.progress(f"loading {config.model.name}"):
        model, _, preprocess = create_model_and_transforms(
            config.model.name,
            config.model.pretrained,
            precision=config.model.precision,
            device=device,
            prompt_config=config.prompt,
            image_resize_mode=config.model.resize_mode,
        )
    Features.prepare(config, model, split, val_split, preprocess, terminal, first=share(os.environ))
    terminal.say(f"{config.data.cache}: all features of {split.root} are stored")


def share(environment: os._Environ[str] | dict[str, str]) -> float:
    """Where in a split this process starts, as a fraction: processes that start at different places rarely meet."""
    for number, count in SHARES:
        if number in environment and int(environment.get(count, 0)) > 1:
            return int(environment[number]) % int(environment[count]) / int(environment[count])
    return 0.0


if __name__ == "__main__":
    main()
