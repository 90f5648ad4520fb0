"""CLIP_benchmark's own command line (https://github.com/LAION-AI/CLIP_benchmark), with adapters as model type `amp`.

amp clip_benchmark eval --model_type amp --model ADAPTER --pretrained adapter --dataset cifar10
"""

import sys

from amp.errors import exit_on_error, typed_command


@exit_on_error()
def main(arguments: list[str] | None = None) -> None:
    from amp.publish.clip_benchmark import register

    register()
    from clip_benchmark.cli import main as run

    sys.argv = [typed_command(), *(sys.argv[1:] if arguments is None else arguments)]  # its parser reads only sys.argv
    run()


if __name__ == "__main__":
    main()
