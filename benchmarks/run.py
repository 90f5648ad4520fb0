"""Runs the benchmarks, writes their figures, and puts the tables into docs/performance.md.

    python -m benchmarks.run                                      # drawn photos, random weights: needs no network
    python -m benchmarks.run --only '[stream]' --photos photos    # one of them, on a folder of photos
    python -m benchmarks.run --model ViT-B-16-quickgelu --pretrained openai --out results/vit_b16.json --page null

Each benchmark has a process of its own, so that none inherits another's memory.
"""

import importlib
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path

from jsonargparse import ArgumentParser

from amp.errors import AmpError, exit_on_error
from amp.retrieval.results import write_atomically
from benchmarks.settings import Settings

ALL = ("stream", "conversion", "step", "rerank", "evaluation", "generation", "scaling")
PATHS = ("photos", "shards", "peer_python", "language_model")  # of this machine, not kept
ON_PHOTOS = ("stream", "conversion")


def parser() -> ArgumentParser:
    parser = ArgumentParser(prog="python -m benchmarks.run", description=__doc__.split("\n")[0])
    parser.add_class_arguments(Settings, as_group=False)
    parser.add_argument("--only", type=list[str], default=list(ALL), help=f"which, some of {', '.join(ALL)}")
    parser.add_argument("--out", type=Path, default=Path("results/benchmark.json"), help="JSON file of the figures")
    parser.add_argument("--page", type=Path | None, default=Path("docs/performance.md"), help="page with the tables")
    parser.add_argument("--alone", type=str | None, help="run this one here, and write its figures alone")
    return parser


def main(arguments: list[str] | None = None) -> None:
    with exit_on_error():
        options = parser().parse_args(arguments)
        settings = Settings(**{key: options[key] for key in Settings.__dataclass_fields__})
        if options.alone:
            write_atomically(options.out, json.dumps(measured(options.alone, settings)).encode())
            return
        unknown = set(options.only) - set(ALL)
        if unknown:
            raise AmpError(f"--only names {', '.join(sorted(unknown))}; expected some of {', '.join(ALL)}")
        figures = json.loads(options.out.read_text()) if options.out.is_file() else {}
        for name in options.only:
            if name == "generation" and settings.language_model is None:
                print("generation is left out: no --language_model", file=sys.stderr)
                continue
            figures[name] = in_own_process(name, arguments if arguments is not None else sys.argv[1:])
            write_atomically(options.out, f"{json.dumps(figures, indent=1)}\n".encode())
        if options.page is not None:
            from benchmarks.tables import fill

            write_atomically(options.page, fill(options.page.read_text(), figures).encode())


def in_own_process(name: str, arguments: list[str]) -> dict:
    """The figures of one benchmark."""
    print(f"{name} ...", file=sys.stderr, flush=True)
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "figures.json"
        command = [sys.executable, "-m", "benchmarks.run", *arguments, "--alone", name, "--out", str(out)]
        # One thread: what a thread does is measured, and on busy machines threads that wait for each other say little.
        if subprocess.run(command, env={"OMP_NUM_THREADS": "1", **os.environ}).returncode:
            raise AmpError(f"benchmark {name} has ended with an error; what it printed stands above")
        return json.loads(out.read_text())


def measured(name: str, settings: Settings) -> dict:
    """Runs one benchmark here; its figures with the machine, the settings and the most memory that was resident."""
    from benchmarks import machine, photos

    module, start = importlib.import_module(f"benchmarks.{name}"), time.time()
    found = {"machine": machine.describe(settings.device)}
    if name in ON_PHOTOS:
        with tempfile.TemporaryDirectory() as folder:
            given = photos.given_or_drawn(Path(folder), settings.photos, settings.images)
            found |= module.run(settings, Path(folder), given)
    else:
        found |= module.run(settings)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3
    kept = {key: value for key, value in asdict(settings).items() if key not in PATHS}
    return found | {"settings": kept, "peak_resident_MB": round(peak), "minutes": round((time.time() - start) / 60, 1)}


if __name__ == "__main__":
    main()
