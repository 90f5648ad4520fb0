"""Runs the benchmarks, prints their tables and stores their figures.

    python -m benchmarks.run                                      # drawn photos, random weights: needs no network
    python -m benchmarks.run --only '[stream]' --photos photos    # one benchmark, on a folder of photos
    python -m benchmarks.run --model ViT-B-16-quickgelu --pretrained openai --out runs/vit_b16.json
    python -m benchmarks.run --record true                        # the tracked figures and docs/performance.md

Each benchmark runs in its own process, so that none inherits another's memory. Its figures are written when it ends.
Figures of other benchmarks in the same file are kept.
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

from amp.errors import AmpError, exit_on_error

with exit_on_error():
    from jsonargparse import ArgumentParser

    from amp.files import write_atomically
    from benchmarks import tables
    from benchmarks.settings import Settings

# Each is a module of this folder with `run` and `TABLES`; to add one, add its name here.
ALL = ("stream", "remote", "conversion", "step", "rerank", "evaluation", "generation", "scaling")
RECORD, PAGE = Path("results/benchmark.json"), Path("docs/performance.md")  # tracked in git
PATHS = ("photos", "shards", "peer_python", "language_model")  # paths of this machine, not stored


def parser() -> ArgumentParser:
    parser = ArgumentParser(prog="python -m benchmarks.run", description=__doc__.split("\n")[0])
    parser.add_class_arguments(Settings, as_group=False)
    parser.add_argument("--only", type=list[str], default=list(ALL), help=f"benchmarks to run, out of {', '.join(ALL)}")
    parser.add_argument("--out", type=Path, default=Path("runs/benchmark.json"), help="JSON file of the figures")
    parser.add_argument("--record", type=bool, default=False, help=f"write {RECORD} and the tables of {PAGE} instead")
    parser.add_argument("--alone", type=str | None, help="run only this benchmark, in this process; used internally")
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
            raise AmpError(f"--only contains {', '.join(sorted(unknown))}, expected some of {', '.join(ALL)}")
        out = RECORD if options.record else options.out
        figures, failed = json.loads(out.read_text()) if out.is_file() else {}, []
        for name in options.only:
            if name == "generation" and settings.language_model is None:
                print("generation is skipped: it needs --language_model", file=sys.stderr)
                continue
            try:
                figures[name] = in_own_process(name, arguments if arguments is not None else sys.argv[1:])
            except AmpError as error:  # the other benchmarks still run
                print(error, file=sys.stderr)
                failed.append(name)
                continue
            write_atomically(out, f"{json.dumps(figures, indent=1)}\n".encode())
            print(f"{tables.of_part(name, figures[name])}\n", flush=True)
            if options.record:
                write_atomically(PAGE, tables.fill(PAGE.read_text(), figures).encode())
        if failed:
            raise AmpError(
                f"{', '.join(failed)} ended with an error (see above); the figures of the others are in {out}"
            )


def in_own_process(name: str, arguments: list[str]) -> dict:
    """Runs one benchmark in its own process and returns its figures."""
    print(f"{name} ...", file=sys.stderr, flush=True)
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "figures.json"
        command = [sys.executable, "-m", "benchmarks.run", *arguments, "--alone", name, "--out", str(out)]
        # One thread, because on a busy machine threads wait for each other and distort the figures.
        if subprocess.run(command, env={"OMP_NUM_THREADS": "1", **os.environ}).returncode:
            raise AmpError(f"benchmark {name} ended with an error; see its output above")
        return json.loads(out.read_text())


def measured(name: str, settings: Settings) -> dict:
    """Runs one benchmark; returns its figures with the machine, the settings and the peak resident memory."""
    from benchmarks import machine, photos

    module, start = importlib.import_module(f"benchmarks.{name}"), time.time()
    found = {"machine": machine.describe(settings.device)}
    if getattr(module, "ON_PHOTOS", False):
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
