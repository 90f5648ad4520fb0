"""Knowledge from a Slurm job array with one cancelled and one requeued task."""

import json

import pytest
from support.drawn_data import draw_dataset

from amp.errors import AmpError
from amp.generation.rules import _find
from amp.generation.run import generate_knowledge

pytestmark = pytest.mark.system

TASKS = 3


def test_job_array(slurm, tmp_path):
    pytest.importorskip("spacy", reason='needs spaCy: pip install "open-clip-amp[generate]"')
    try:
        _find(None)
    except AmpError as error:
        pytest.skip(str(error))
    captions = draw_dataset(tmp_path, {"train": 30, "test": 12})["captions"]
    whole = generate_knowledge(captions, str(tmp_path / "plain"))
    out = tmp_path / "out"

    def submit(*options: str) -> str:
        logs = f"--output={tmp_path}/%A_%a.log" if "--array" in options[0] else f"--output={tmp_path}/%j.log"
        arguments = [f"--captions={captions}", f"--out={out}"]
        return slurm.sbatch(*options, logs, "launchers/slurm/generate_knowledge.sbatch", *arguments)

    def log(job: str) -> str:
        return (tmp_path / f"{job}.log").read_text()

    array = submit(f"--array=0-{TASKS - 1}", "--hold")
    last = submit(f"--dependency=afterany:{array}")
    slurm.run("scancel", f"{array}_1")
    slurm.run("scontrol", "release", array)
    slurm.wait(last, {"COMPLETED"})
    assert [slurm.state(f"{array}_{task}") for task in (0, 2)] == ["COMPLETED", "COMPLETED"]
    assert not (tmp_path / f"{array}_1.log").exists()
    assert f"part 2/{TASKS}: all" in log(f"{array}_2")
    files = {path.name: len(path.read_text().splitlines()) for path in (out / "cache").glob("*.jsonl")}
    assert sorted(files) == [
        "replies-00000-of-00001.jsonl",
        f"replies-00000-of-0000{TASKS}.jsonl",
        f"replies-00002-of-0000{TASKS}.jsonl",
    ]
    assert sum(files.values()) == whole.distinct and all(files.values())  # the last job did the rest of task 1
    assert (out / "knowledge.jsonl").read_bytes() == (tmp_path / "plain" / "knowledge.jsonl").read_bytes()

    slurm.run("scontrol", "requeue", f"{array}_0")
    slurm.wait(f"{array}_0", {"COMPLETED"})
    assert log(f"{array}_0").count(f"part 0/{TASKS}: all") == 2
    assert {path.name: len(path.read_text().splitlines()) for path in (out / "cache").glob("*.jsonl")} == files

    # After a failed task, jobs that depend on it by afterok never start, and the last job reports why.
    broken = slurm.sbatch(
        f"--output={tmp_path}/%j.log",
        "launchers/slurm/generate_knowledge.sbatch",
        f"--captions={captions}",
        f"--out={out}",
        "--fallback=none",
    )
    slurm.wait(broken, {"FAILED"})
    assert "'options.fallback' was 'rules' and is now 'none'" in log(broken)
    assert json.loads((out / "knowledge_provenance.json").read_text())["distinct_captions"] == whole.distinct
