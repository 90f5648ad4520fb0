"""`amp prepare`: stores everything that a training run would compute first."""

import pytest
from support.training_run import small_run

from amp.commands import prepare
from amp.commands.prepare import share
from amp.data.split import ShardSplit
from amp.train.engine import train


def options(shards, clip_folder, tmp_path, **more) -> list[str]:
    settings = {
        "data.shards": shards,
        "data.cache": tmp_path / "cache",
        "data.workers": 0,
        "data.augment": "none",
        "data.batch_size": 4,
        "model.name": clip_folder,
        "model.pretrained": "null",
        "prompt.depth": 0.34,
        **more,
    }
    return [f"--{key}={value}" for key, value in settings.items()]


@pytest.mark.usefixtures("fresh_accelerate")
def test_a_prepared_run_encodes_nothing(shards, clip_folder, tmp_path, monkeypatch, capsys):
    prepare.main(options(shards, clip_folder, tmp_path, **{"data.cache_images": "true"}))
    assert "all features of" in capsys.readouterr().err
    splits = [ShardSplit(shards, split) for split in ("train", "val")]
    count = sum(len(split.shards) for split in splits)
    cache = tmp_path / "cache"
    assert len(list(cache.glob("image-*"))) == count and len(list(cache.glob("text-*/shard-*"))) == 2 * count

    def encoded(*_, **__):
        raise AssertionError("the run encodes something")

    monkeypatch.setattr("amp.data.prepare.encode_texts", encoded)
    monkeypatch.setattr("amp.data.prepare.compute_frozen_features", encoded)
    data = {"val_split": "val", "cache_images": True, "batch_size": 4}
    config = small_run(shards, clip_folder, tmp_path, data, cache, stages=[1], validation_queries=4)
    config.prompt.depth, config.prompt.knowledge = 0.34, "both"
    config.stage1.epochs = 1
    train(config)
    assert "stage 1" in capsys.readouterr().err


def test_wrong_input_is_refused_before_the_model_is_built(clip_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("amp.model.factory.create_model_and_transforms", lambda *_, **__: pytest.fail("built"))
    with pytest.raises(SystemExit):
        prepare.main(options(tmp_path / "nowhere", clip_folder, tmp_path))
    assert "nowhere: no such folder" in capsys.readouterr().err


def test_processes_start_at_different_places():
    places = [share({"SLURM_ARRAY_TASK_ID": str(i), "SLURM_ARRAY_TASK_COUNT": "4"}) for i in (0, 1, 3)]
    assert places == [0.0, 0.25, 0.75]
    assert share({"RANK": "1", "WORLD_SIZE": "2", "SLURM_PROCID": "0", "SLURM_NTASKS": "1"}) == 0.5
    assert share({"RANK": "0", "WORLD_SIZE": "1", "SLURM_PROCID": "6", "SLURM_NTASKS": "8"}) == 0.75
    assert share({}) == 0.0
