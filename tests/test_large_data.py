"""Sets larger than memory: shards on the disk, decoded at access, with coresets and an exact resume on them."""

from __future__ import annotations

import io
import logging
import multiprocessing
import pickle
import tarfile
import time

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from training import tiny_rcs, tiny_trainer

from hf_robust import image_decoding
from hf_robust.coresets import RandomCoreset
from hf_robust.data import load_image_dataset
from hf_robust.objectives.acl import ACL

BROKEN = 5


def png(seed: int) -> bytes:
    content = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(content, "PNG")
    return content.getvalue()


def webdataset(folder, broken=()):
    """Two tar files with 12 images each and their classes."""
    folder.mkdir()
    for shard in range(2):
        with tarfile.open(folder / f"train-{shard:05d}.tar", "w") as tar:
            for k in range(12 * shard, 12 * shard + 12):
                image = png(k)[:60] if k in broken else png(k)
                for kind, content in (("png", image), ("cls", str(k % 3).encode())):
                    entry = tarfile.TarInfo(f"{k:06d}.{kind}")
                    entry.size = len(content)
                    tar.addfile(entry, io.BytesIO(content))
    return folder


def parquet(folder, broken=()):
    folder.mkdir()
    for shard in range(2):
        rows = range(12 * shard, 12 * shard + 12)
        records = [{"bytes": png(k)[:60] if k in broken else png(k), "path": None} for k in rows]
        features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
        table = datasets.Dataset.from_dict({"image": records, "label": [k % 3 for k in rows]}, features=features)
        table.to_parquet(folder / f"train-{shard:05d}-of-00002.parquet")
    return folder


@pytest.fixture(autouse=True)
def private_cache(tmp_path_factory, monkeypatch):
    """No network, no shared cache, no bars."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    datasets.disable_progress_bars()
    yield
    datasets.enable_progress_bars()


@pytest.fixture
def decoded(monkeypatch):
    """How many images have been decoded so far."""
    calls, real = [], image_decoding._decode
    monkeypatch.setattr(image_decoding, "_decode", lambda *args: calls.append(1) or real(*args))
    return calls


@pytest.mark.parametrize("make", [webdataset, parquet])
def test_shards_are_decoded_when_an_image_is_asked_for_and_not_before(make, tmp_path, decoded):
    folder = make(tmp_path / "shards")
    held = load_image_dataset(folder)
    assert len(decoded) == 24 and held.labels.tolist() == [k % 3 for k in range(24)]
    streamed = load_image_dataset(folder, memory_budget=0, check_images=False)
    assert len(decoded) == 24 and streamed.images is None and streamed.image_size == (8, 8)
    assert torch.equal(streamed[17]["image"], held[17]["image"]) and len(decoded) == 25
    assert len(pickle.dumps(streamed)) < 24 * len(png(0)), "the shards are mapped, not carried"
    load_image_dataset(folder, memory_budget=0)
    assert len(decoded) == 49  # looked at, once


def test_a_broken_image_that_nobody_looked_at_shows_at_access(tmp_path, caplog):
    folder = webdataset(tmp_path / "shards", broken={BROKEN, BROKEN + 1, 23})
    strict = load_image_dataset(folder, image_size=8, memory_budget=0, check_images=False)
    assert strict[4]["index"] == 4
    with pytest.raises(ValueError, match=f'row {BROKEN} of .* cannot be read as an image.*on_error="skip"'):
        strict[BROKEN]
    lenient = load_image_dataset(folder, image_size=8, memory_budget=0, check_images=False, on_error="skip")
    assert len(lenient) == 24
    with caplog.at_level(logging.WARNING, "hf_robust"):
        items = [lenient[k] for k in (BROKEN, BROKEN, 23, 8)]
    # the next readable image, after the last one the first, with its own number and class
    assert [(item["index"], item["label"]) for item in items] == [(7, 1), (7, 1), (0, 0), (8, 2)]
    assert torch.equal(items[0]["image"], lenient[7]["image"])
    assert len(caplog.records) == 3 and f"row {BROKEN} of" in caplog.text and "takes its place" in caplog.text
    assert lenient.subset([BROKEN, 9])[0]["index"] == 1


def test_without_looking_at_all_images_a_sample_tells_the_size(tmp_path, monkeypatch):
    monkeypatch.setattr(image_decoding, "_SAMPLED_SIZES", 3)
    looked, real = [], image_decoding._opened
    monkeypatch.setattr(image_decoding, "_opened", lambda record: looked.append(1) or real(record))
    loaded = load_image_dataset(parquet(tmp_path / "shards"), memory_budget=0, check_images=False)
    assert loaded.image_size == (8, 8) and len(looked) == 3


def test_streams_are_refused_with_the_way_out(tmp_path):
    stream = datasets.load_dataset(str(parquet(tmp_path / "shards")), split="train", streaming=True)
    for given in (stream, datasets.IterableDatasetDict({"train": stream})):
        with pytest.raises(ValueError, match="in any order, got Iterable.*leave streaming=True out"):
            load_image_dataset(given)


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return webdataset(tmp_path_factory.mktemp("set") / "shards")


@pytest.mark.parametrize("method", [tiny_rcs(), RandomCoreset(fraction=0.5, warmup_epochs=1, interval=1)])
def test_coresets_and_a_resume_on_shards_equal_those_in_memory(method, shards, tmp_path):
    """Selections, weights after a whole training, and after one that stopped in between."""
    held = load_image_dataset(shards)
    streamed = load_image_dataset(shards, memory_budget=0, check_images=False)
    setting = {
        "num_train_epochs": 2,
        "save_strategy": "steps",
        "save_steps": 5,
        "save_total_limit": 9,
        "coreset": method,
    }
    ends, chosen = [], []

    def run(folder, data, resume=None, **more):
        trainer = tiny_trainer(folder, ACL(), data=data, **setting, **more)
        trainer.train(resume_from_checkpoint=resume)
        ends.append({key: value.clone() for key, value in trainer.model.state_dict().items()})
        chosen.append(trainer.phases.current.indices)

    run(tmp_path / "held", held)
    run(tmp_path / "streamed", streamed, dataloader_num_workers=1)
    run(tmp_path / "streamed", streamed, str(tmp_path / "streamed" / "checkpoint-5"))
    assert chosen[0] == chosen[1] == chosen[2]
    for other in ends[1:]:
        assert [key for key, value in ends[0].items() if not torch.equal(other[key], value)] == []


class Counting(torch.utils.data.Dataset):
    """Counts, over all processes, how many images have been asked for."""

    def __init__(self, data, asked):
        self.data, self.asked = data, asked
        self.name, self.labels, self.image_size = data.name, data.labels, data.image_size
        self.num_classes = data.num_classes

    def __len__(self):
        return len(self.data)

    def __getitem__(self, index):
        with self.asked.get_lock():
            self.asked.value += 1
        return self.data[index]


def test_workers_decode_the_next_batches_while_a_step_runs(shards, tmp_path):
    asked = multiprocessing.get_context("fork").Value("i", 0)
    data = Counting(load_image_dataset(shards, memory_budget=0, check_images=False), asked)
    trainer = tiny_trainer(tmp_path, ACL(), data=data, max_steps=2, dataloader_num_workers=1)
    before_step, seen = trainer.before_step, []

    def note():
        before_step()
        end = time.monotonic() + 5
        while not seen and asked.value < 12 and time.monotonic() < end:  # no image is asked for by this process
            time.sleep(0.01)
        seen.append(asked.value)

    trainer.before_step = note
    trainer.train()
    assert seen[0] >= 12, "in the first step of 4 images, two more batches are on their way"
