from __future__ import annotations

import io
import logging
import pickle
import subprocess
import sys

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from hf_robust.data import ImageDataset, collate_images, epoch_order, load_image_dataset

NAMES = ["cat", "dog", "owl"]


@pytest.fixture(autouse=True)
def private_cache(tmp_path_factory, monkeypatch):
    """No network, no shared cache, no bars: whatever a test loads comes from its own folder."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    datasets.disable_progress_bars()
    yield
    datasets.enable_progress_bars()


def picture(seed: int, size: tuple[int, int] = (8, 8)) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8))


def encode(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    content = io.BytesIO()
    image.save(content, kind, **options)
    return content.getvalue()


def pixels(image: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def table(images: list, labels: list | None = None, names: list[str] | None = None) -> datasets.Dataset:
    """A labelled set under the names that CIFAR uses; images are pictures, bytes or None."""
    records = [
        {"bytes": encode(i) if isinstance(i, Image.Image) else i, "path": f"{n}.png"} if i is not None else None
        for n, i in enumerate(images)
    ]
    columns, features = {"img": records}, {"img": datasets.Image()}
    if labels is not None:
        columns["label"], features["label"] = labels, datasets.ClassLabel(names=names or NAMES)
    return datasets.Dataset.from_dict(columns, features=datasets.Features(features))


def truncated_jpeg() -> bytes:
    return encode(picture(99, (64, 64)), "JPEG")[:-400]


PICTURES = [picture(seed) for seed in range(6)]
LABELS = [0, 1, 2, 0, 1, 2]


# Sources ------------------------------------------------------------------------------------------------------------


def parquet_folder(folder):
    folder.mkdir()
    table(PICTURES, LABELS).to_parquet(folder / "train-00000-of-00001.parquet")
    return folder


def arrow_folder(folder):
    folder.mkdir()
    source = table(PICTURES, LABELS)
    with pa.OSFile(str(folder / "train.arrow"), "wb") as file:
        with pa.ipc.new_stream(file, source.data.table.schema) as writer:
            writer.write_table(source.data.table)
    return folder


def saved_dataset(folder):
    table(PICTURES, LABELS).save_to_disk(folder)
    return folder


def saved_dict(folder):
    whole = table(PICTURES, LABELS)
    datasets.DatasetDict(train=whole, test=whole.select([5])).save_to_disk(folder)
    return folder


def image_folder(folder):
    for position, (image, label) in enumerate(zip(PICTURES, LABELS, strict=True)):
        (folder / NAMES[label]).mkdir(parents=True, exist_ok=True)
        image.save(folder / NAMES[label] / f"{position}.png")
    return folder


@pytest.mark.parametrize("make", [parquet_folder, arrow_folder, saved_dataset, saved_dict, image_folder])
@pytest.mark.parametrize("as_text", [True, False])
def test_folder_sources_give_the_same_pictures_and_labels(make, as_text, tmp_path):
    folder = make(tmp_path / "source")
    loaded = load_image_dataset(str(folder) if as_text else folder)
    assert loaded.images.dtype == torch.uint8 and loaded.images.shape == (6, 3, 8, 8)
    assert loaded.labels.dtype == torch.int64
    assert loaded.label_names == tuple(NAMES) and loaded.num_classes == 3
    assert loaded.name == str(folder) and loaded.image_size == (8, 8)
    order = sorted(range(6), key=lambda i: (LABELS[i], i)) if make is image_folder else range(6)
    assert torch.equal(loaded.images, torch.stack([pixels(PICTURES[i]) for i in order]))
    assert loaded.labels.tolist() == [LABELS[i] for i in order]


def test_dataset_objects_and_their_formats(tmp_path):
    source = table(PICTURES, LABELS)
    expected = torch.stack([pixels(image) for image in PICTURES])
    for given in (source, source.with_format("torch"), source.with_transform(lambda batch: {"gone": [1]})):
        assert torch.equal(load_image_dataset(given).images, expected)
    reordered = load_image_dataset(source.select([4, 2]))
    assert torch.equal(reordered.images, expected[[4, 2]]) and reordered.labels.tolist() == [1, 2]
    both = datasets.DatasetDict(train=source, test=source.select([5]))
    assert len(load_image_dataset(both, "test")) == 1


def test_flat_and_one_class_image_folders_are_unlabelled(tmp_path):
    for name, inner in (("flat", "flat"), ("one", "one/cat")):
        (tmp_path / inner).mkdir(parents=True)
        PICTURES[0].save(tmp_path / inner / "a.png")
        loaded = load_image_dataset(tmp_path / name)
        assert loaded.labels is None and loaded.num_classes is None and loaded.label_names is None
        assert set(loaded[0]) == {"image", "index"}


def test_splits_and_split_expressions(tmp_path):
    folder = tmp_path / "source"
    folder.mkdir()
    table(PICTURES, LABELS).to_parquet(folder / "train.parquet")
    table(PICTURES[:2], LABELS[:2]).to_parquet(folder / "test.parquet")
    assert [len(load_image_dataset(folder, split)) for split in ("train", "test", "train[:3]", "train+test")] == [
        *(6, 2, 3, 8)
    ]
    with pytest.raises(ValueError, match="no split 'validation': available splits: (train, test|test, train)"):
        load_image_dataset(folder, "validation")


@pytest.mark.parametrize("make", [parquet_folder, image_folder])
def test_missing_split_of_a_set_with_one_split(make, tmp_path):
    with pytest.raises(ValueError, match="no split 'test': it has only one split, write split='train'"):
        load_image_dataset(make(tmp_path / "source"), split="test")


def test_missing_split_when_train_was_asked(tmp_path):
    table(PICTURES).to_parquet(tmp_path / "test.parquet")
    with pytest.raises(ValueError, match="no split 'train': it has only one split, write split='test'"):
        load_image_dataset(tmp_path)


def test_missing_split_of_saved_and_given_sets(tmp_path):
    with pytest.raises(ValueError, match="no split 'val': available splits: train, test"):
        load_image_dataset(saved_dict(tmp_path / "dict"), "val")
    for single in (saved_dataset(tmp_path / "single"), table(PICTURES)):
        with pytest.raises(ValueError, match="is a single Dataset, which has no split 'test'"):
            load_image_dataset(single, "test")
    tests = table(PICTURES)
    tests._split = datasets.Split.TEST
    assert len(load_image_dataset(tests)) == len(load_image_dataset(tests, "test")) == 6


def test_configurations(tmp_path):
    for name, count in (("small", 1), ("large", 4)):
        (tmp_path / name).mkdir()
        table(PICTURES[:count]).to_parquet(tmp_path / name / "train.parquet")
    configs = "".join(f"- config_name: {name}\n  data_files: {name}/*.parquet\n" for name in ("small", "large"))
    (tmp_path / "README.md").write_text(f"---\nconfigs:\n{configs}---\n", encoding="utf-8")
    assert len(load_image_dataset(f"{tmp_path}:large")) == 4
    for name in (str(tmp_path), f"{tmp_path}:middle"):
        with pytest.raises(ValueError, match=r"several configurations.*:CONFIG'.*small.*large"):
            load_image_dataset(name)


@pytest.mark.parametrize("name", ["nobody/nothing", "nothing", "./nothing", "/no/such/folder", "a/b/c", "two words"])
def test_unknown_source_says_both_places_and_the_offline_hint(name):
    with pytest.raises(FileNotFoundError, match="not a folder on this machine.*not found on the Hub.*HF_HUB_OFFLINE"):
        load_image_dataset(name)


def test_no_offline_hint_when_online(monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    with pytest.raises(FileNotFoundError) as error:
        load_image_dataset("./nothing")
    assert "HF_HUB_OFFLINE" not in str(error.value)


def test_misspelt_digits():
    with pytest.raises(FileNotFoundError, match="did you mean 'digits'"):
        load_image_dataset("digit")


def test_files_empty_folders_and_empty_sets(tmp_path):
    with pytest.raises(ValueError, match="is a file, a data set is a folder: pass"):
        load_image_dataset(parquet_folder(tmp_path / "parquet") / "train-00000-of-00001.parquet")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="holds no data files: put parquet"):
        load_image_dataset(tmp_path / "empty")
    with pytest.raises(ValueError, match="is empty"):
        load_image_dataset(table([]))
    (tmp_path / "no_rows").mkdir()
    table([]).to_parquet(tmp_path / "no_rows" / "train.parquet")
    with pytest.raises(ValueError, match="is empty"):
        load_image_dataset(tmp_path / "no_rows")
    with pytest.raises(ValueError, match="got list: for tensors use ImageDataset.from_tensors"):
        load_image_dataset([PICTURES[0]])


# Columns and labels -------------------------------------------------------------------------------------------------


def with_columns(**columns) -> datasets.Dataset:
    """Six pictures and further columns, each given as (values, feature)."""
    source = table(PICTURES)
    for name, (values, feature) in columns.items():
        source = source.add_column(name, values, feature=feature)
    return source


INTEGER, TEXT = datasets.Value("int64"), datasets.Value("string")
CLASSES = datasets.ClassLabel(names=NAMES)


def test_no_image_column_lists_columns_with_types():
    source = datasets.Dataset.from_dict({"text": ["a"], "number": [1]})
    with pytest.raises(ValueError, match=r"no image column.*text \(Value\('string'\)\), number \(Value\('int64'\)\)"):
        load_image_dataset(source)


def test_several_image_columns():
    records = [{"bytes": encode(picture(50)), "path": None}] * 6
    ambiguous = with_columns(mask=(records, datasets.Image()))
    assert torch.equal(load_image_dataset(ambiguous).images[0], pixels(PICTURES[0])), "img is the usual name"
    ambiguous = ambiguous.rename_column("img", "photo")
    with pytest.raises(ValueError, match="2 columns that could be the image_column: photo, mask"):
        load_image_dataset(ambiguous)
    assert torch.equal(load_image_dataset(ambiguous, image_column="mask").images[0], pixels(picture(50)))


def test_an_empty_name_is_none():
    source = with_columns(fine_label=(LABELS, CLASSES))
    loaded, plain = load_image_dataset(source, image_column="", label_column=""), load_image_dataset(source)
    assert torch.equal(loaded.images, plain.images) and torch.equal(loaded.labels, plain.labels)


def test_wrong_column_names_give_close_matches():
    source = with_columns(fine_label=(LABELS, CLASSES))
    with pytest.raises(ValueError, match="no image_column 'imgs'.*did you mean 'img'"):
        load_image_dataset(source, image_column="imgs")
    with pytest.raises(ValueError, match="no label_column 'finelabel'.*did you mean 'fine_label'"):
        load_image_dataset(source, label_column="finelabel")
    with pytest.raises(ValueError, match="no label_column 'xyz', its columns are img, fine_label"):
        load_image_dataset(source, label_column="xyz")
    with pytest.raises(ValueError, match="image_column 'fine_label' .* has type ClassLabel"):
        load_image_dataset(source, image_column="fine_label")


def test_images_without_feature_types(tmp_path):
    records = [{"bytes": encode(image), "path": None} for image in PICTURES]
    raw = pa.table({"picture": records, "raw": [record["bytes"] for record in records], "label": LABELS})
    pq.write_table(raw, tmp_path / "train.parquet")
    PICTURES[3].save(tmp_path / "3.png")
    expected = torch.stack([pixels(image) for image in PICTURES])
    loaded = load_image_dataset(datasets.Dataset(raw))
    assert torch.equal(loaded.images, expected) and loaded.labels.tolist() == LABELS
    assert torch.equal(load_image_dataset(datasets.Dataset(raw), image_column="raw").images, expected)
    paths = datasets.Dataset.from_dict({"file": [str(tmp_path / "3.png")]})
    assert torch.equal(load_image_dataset(paths, image_column="file").images[0], expected[3])


def test_several_label_columns_ask():
    source = with_columns(fine_label=(LABELS, CLASSES), coarse_label=([0] * 6, datasets.ClassLabel(names=["pet"])))
    with pytest.raises(ValueError, match=r"2 columns that could be the label_column: fine_label, coarse_label"):
        load_image_dataset(source)
    assert load_image_dataset(source, label_column="fine_label").labels.tolist() == LABELS
    coarse = load_image_dataset(source, label_column="coarse_label")
    assert coarse.num_classes == 1 and coarse.labels.tolist() == [0] * 6
    assert load_image_dataset(source, label_column="none").labels is None
    usual = source.rename_column("coarse_label", "label")
    assert load_image_dataset(usual).label_names == ("pet",)


def test_integer_and_string_labels():
    source = with_columns(number=([4, 0, 1, 4, 0, 1], INTEGER), word=(["b", "a", "c", "e", "d", "f"], TEXT))
    assert load_image_dataset(source).labels is None, "neither is called label"
    numbers = load_image_dataset(source, label_column="number")
    assert numbers.labels.tolist() == [4, 0, 1, 4, 0, 1]
    assert numbers.num_classes == 5 and numbers.label_names is None
    words = load_image_dataset(source, label_column="word")
    assert words.labels.tolist() == [1, 0, 2, 4, 3, 5] and words.label_names == tuple("abcdef")
    assert load_image_dataset(source.rename_column("word", "labels")).label_names == tuple("abcdef")
    flags = load_image_dataset(
        with_columns(odd=([True, False] * 3, datasets.Value("bool"))), "train", label_column="odd"
    )
    assert flags.labels.tolist() == [1, 0] * 3


def test_unusable_labels():
    with pytest.raises(ValueError, match="has type Value.'float64'.*labels must be ClassLabel, integers or strings"):
        load_image_dataset(with_columns(x=([0.5] * 6, datasets.Value("float64"))), label_column="x")
    with pytest.raises(ValueError, match="holds the label 123456789, class numbers must be below 100000"):
        load_image_dataset(with_columns(label=([123456789] * 6, INTEGER)))


@pytest.mark.parametrize(
    ("values", "feature"),
    [([-1] * 6, CLASSES), ([None, -1] * 3, CLASSES), ([None] * 6, INTEGER), (["", None] * 3, TEXT)],
)
def test_labels_that_are_all_missing_make_an_unlabelled_set(values, feature, caplog):
    with caplog.at_level(logging.INFO, "hf_robust"):
        loaded = load_image_dataset(with_columns(label=(values, feature)))
    assert loaded.labels is None and loaded.num_classes is None
    assert "every label in column 'label' is missing" in caplog.text


@pytest.mark.parametrize(
    ("values", "feature"),
    [([0, 1, -1] * 2, CLASSES), ([0, 1, None] * 2, INTEGER), (["a", "b", None] * 2, TEXT), (["a", "b", ""] * 2, TEXT)],
)
def test_labels_that_are_partly_missing_are_an_error(values, feature):
    source = with_columns(label=(values, feature))
    with pytest.raises(ValueError, match="2 of 6 labels in column 'label' .* are missing .*first in row 2"):
        load_image_dataset(source)
    assert load_image_dataset(source, label_column="none").labels is None


# Pixels -------------------------------------------------------------------------------------------------------------


def load_one(content: bytes, **options) -> torch.Tensor:
    return load_image_dataset(table([content]), **options).images[0]


def test_transparency_is_composited_over_white():
    values = np.zeros((4, 4, 4), dtype=np.uint8)
    values[..., 0] = 200
    values[:, 1, 3], values[:, 2:, 3] = 128, 255
    expected = np.full((4, 4, 3), 255, dtype=np.uint8)  # fully transparent: white, whatever colour lies under it
    expected[:, 1] = [round((200 * 128 + 255 * 127) / 255), *[round(255 * 127 / 255)] * 2]
    expected[:, 2:] = [200, 0, 0]
    loaded = load_one(encode(Image.fromarray(values)))
    assert (loaded.int() - torch.from_numpy(expected).permute(2, 0, 1).int()).abs().max() <= 1
    assert torch.equal(loaded[:, :, 0], torch.full((3, 4), 255, dtype=torch.uint8))


def test_grey_with_alpha():
    image = Image.merge("LA", [Image.new("L", (2, 2), 50), Image.new("L", (2, 2), 0)])
    assert (load_one(encode(image)) == 255).all()


def test_palette_with_and_without_transparency():
    image = Image.new("P", (2, 1))
    image.putpalette([10, 20, 30, 40, 50, 60])
    image.putdata([0, 1])
    assert load_one(encode(image)).tolist() == [[[10, 40]], [[20, 50]], [[30, 60]]]
    assert load_one(encode(image, transparency=0)).tolist() == [[[255, 40]], [[255, 50]], [[255, 60]]]


def test_grey_and_black_and_white():
    image = Image.fromarray(np.arange(16, dtype=np.uint8).reshape(4, 4) * 16)
    loaded = load_one(encode(image))
    assert torch.equal(loaded, torch.from_numpy(np.array(image)).expand(3, 4, 4))
    bits = load_one(encode(image.point(lambda value: 255 * (value > 100)).convert("1")))
    assert set(bits.flatten().tolist()) == {0, 255}


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_sixteen_bit_grey_is_scaled_not_clipped(kind):
    values = np.array([[0, 257, 30000], [65535, 128, 129]], dtype=np.uint16)
    loaded = load_one(encode(Image.fromarray(values), kind))
    assert loaded[0].tolist() == [[0, 1, 117], [255, 0, 1]]
    assert torch.equal(loaded[0], loaded[1]) and torch.equal(loaded[0], loaded[2])


def test_float_images():
    loaded = load_one(encode(Image.fromarray(np.array([[0.0, 0.5, 1.0]], dtype=np.float32)), "TIFF"))
    assert loaded[0].tolist() == [[0, 128, 255]]
    with pytest.raises(ValueError, match="row 0 .*exceed 0..1"):
        load_one(encode(Image.fromarray(np.array([[0.0, 7.0]], dtype=np.float32)), "TIFF"))


def test_cmyk():
    image = Image.new("CMYK", (8, 8), (0, 255, 255, 0))
    loaded = load_one(encode(image, "JPEG", quality=100))
    assert loaded[0].min() > 240 and loaded[1:].max() < 15


def test_exif_orientation_is_applied():
    image = picture(1, (4, 6))
    exif = Image.Exif()
    exif[0x0112] = 6  # turn clockwise to see it upright
    loaded = load_image_dataset(table([encode(image, "PNG", exif=exif)]))
    assert loaded.image_size == (6, 4)
    assert torch.equal(loaded.images[0], pixels(image.transpose(Image.Transpose.ROTATE_270)))


# Sizes --------------------------------------------------------------------------------------------------------------


def test_native_size_is_kept_when_all_agree():
    loaded = load_image_dataset(table([picture(1, (6, 10)), picture(2, (6, 10))]))
    assert loaded.image_size == (6, 10) and torch.equal(loaded.images[1], pixels(picture(2, (6, 10))))


def test_mixed_sizes_take_the_median_shorter_side_at_most_256(caplog):
    with caplog.at_level(logging.INFO, "hf_robust"):
        loaded = load_image_dataset(table([picture(1, (12, 30)), picture(2, (20, 16)), picture(3, (40, 50))]))
        assert loaded.image_size == (16, 16) and loaded.images.shape == (3, 3, 16, 16)
    assert "shorter sides of 12 to 40 pixels" in caplog.text and "shorter side of 16" in caplog.text
    large = load_image_dataset(table([picture(1, (300, 300)), picture(2, (310, 300))]))
    assert large.image_size == (256, 256)


def test_named_size_resizes_the_shorter_side_and_crops_the_centre():
    values = np.zeros((8, 24, 3), dtype=np.uint8)
    values[:, 8:16] = 255  # the centre square is white, the rest black
    loaded = load_image_dataset(table([Image.fromarray(values)]), image_size=8)
    assert loaded.images.shape == (1, 3, 8, 8) and (loaded.images == 255).all()
    smaller = load_image_dataset(table([Image.fromarray(values.transpose(1, 0, 2))]), image_size=4)
    assert smaller.images.shape == (1, 3, 4, 4) and (smaller.images[:, :, 1:3] > 245).all()
    untouched = load_image_dataset(table(PICTURES), image_size=8)
    assert torch.equal(untouched.images[2], pixels(PICTURES[2]))


# Broken images ------------------------------------------------------------------------------------------------------


BROKEN = {
    "truncated JPEG": truncated_jpeg(),
    "truncated PNG": encode(picture(1, (64, 64)))[:2000],
    "no image": b"this is text",
    "empty": b"",
    "null": None,
}


@pytest.mark.parametrize("budget", [2**30, 1], ids=["in memory", "streamed"])
@pytest.mark.parametrize("size", [8, None])
@pytest.mark.parametrize("broken", BROKEN.values(), ids=BROKEN)
def test_a_broken_image_raises_or_is_skipped(broken, size, budget, caplog):
    source = table([PICTURES[0], PICTURES[1], broken, PICTURES[3]], [0, 1, 2, 2])
    options = {"image_size": size, "memory_budget": budget}
    with pytest.raises(ValueError, match=r'row 2 of .* cannot be read as an image.*on_error="skip"'):
        load_image_dataset(source, **options)
    with caplog.at_level(logging.WARNING, "hf_robust"):
        loaded = load_image_dataset(source, on_error="skip", **options)
    (record,) = caplog.records
    assert "skipped 1 of 4 images that cannot be read, rows 2" in record.getMessage()
    assert len(loaded) == 3 and loaded.labels.tolist() == [0, 1, 2] and loaded.num_classes == 3
    if size == 8:  # else the header of a truncated image counts among the sizes, and the others are resized
        items = [loaded[i] for i in range(3)]
        assert all(torch.equal(item["image"], pixels(PICTURES[i])) for item, i in zip(items, (0, 1, 3), strict=True))
        assert [item["index"] for item in items] == [0, 1, 2]


def test_the_error_names_file_and_original_row(tmp_path):
    for position in range(3):
        PICTURES[position].save(tmp_path / f"{position}.png")
    (tmp_path / "1.png").write_bytes(truncated_jpeg())
    with pytest.raises(ValueError, match=r"row 1 of .*\(file .*1\.png\) cannot be read.*truncated"):
        load_image_dataset(tmp_path)
    with pytest.raises(ValueError, match="row 0 .*not an image format that Pillow knows"):
        load_image_dataset(table([b"this is text"]))
    (tmp_path / "1.png").unlink()
    paths = datasets.Dataset.from_dict({"file": [str(tmp_path / "1.png")]})
    with pytest.raises(ValueError, match="row 0 .*No such file"):
        load_image_dataset(paths, image_column="file")


def test_rows_are_those_of_the_source_after_max_examples(caplog):
    broken = {40, 41, 42, 43}
    source = table([b"x" if i in broken else PICTURES[0] for i in range(60)])
    with caplog.at_level(logging.WARNING, "hf_robust"):
        loaded = load_image_dataset(source, on_error="skip", max_examples=58)
    named = {int(row) for row in caplog.records[0].getMessage().split("rows ")[1].split(", ")}
    assert named and named <= broken and len(loaded) == 58 - len(named)
    with pytest.raises(ValueError, match=f"row {min(named)} "):
        load_image_dataset(source, max_examples=58, image_size=8)


def test_every_image_broken():
    with pytest.raises(ValueError, match="none of the 2 images .* check image_column, here 'img'"):
        load_image_dataset(table([b"x", b"y"]), on_error="skip")


def test_the_first_broken_row_is_the_one_named():
    source = table([PICTURES[0] if i not in (140, 400) else b"x" for i in range(420)])
    with pytest.raises(ValueError, match="row 140 "):
        load_image_dataset(source, image_size=8)


def test_a_file_that_breaks_after_loading_is_named_at_access(tmp_path):
    PICTURES[0].save(tmp_path / "0.png")
    paths = datasets.Dataset.from_dict({"file": [str(tmp_path / "0.png")]})
    loaded = load_image_dataset(paths, image_column="file", memory_budget=1)
    (tmp_path / "0.png").write_bytes(b"gone")
    with pytest.raises(ValueError, match=r"row 0 of .*file .*0\.png"):
        loaded[0]


# Memory and access --------------------------------------------------------------------------------------------------


def test_streamed_equals_in_memory(caplog):
    images = [picture(seed, (10 + seed % 3, 14)) for seed in range(20)]
    source = table(images, [i % 3 for i in range(20)])
    held = load_image_dataset(source)
    with caplog.at_level(logging.INFO, "hf_robust"):
        streamed = load_image_dataset(source, memory_budget=held.images.nbytes - 1)
    assert "is streamed: 20 images" in caplog.text and "memory_budget" in caplog.text
    assert streamed.images is None and torch.equal(streamed.labels, held.labels)
    assert load_image_dataset(source, memory_budget=held.images.nbytes).images is not None
    assert len(streamed) == 20 and streamed.image_size == held.image_size
    for part_streamed, part_held in ((streamed, held), (streamed.subset([7, 3, 3]), held.subset([7, 3, 3]))):
        for one, other in zip(part_streamed, part_held, strict=True):
            assert torch.equal(one["image"], other["image"])
            assert (one["label"], one["index"]) == (other["label"], other["index"])


def test_streamed_in_data_loader_workers():
    loaded = load_image_dataset(table(PICTURES, LABELS), memory_budget=1)
    # spawn pickles the data set, which fork would not
    loader = DataLoader(
        loaded, batch_size=4, collate_fn=collate_images, num_workers=1, multiprocessing_context="spawn"
    )
    batches = list(loader)
    assert torch.equal(torch.cat([b["image"] for b in batches]), torch.stack([pixels(i) for i in PICTURES]))
    assert torch.cat([b["index"] for b in batches]).tolist() == list(range(6))


@pytest.mark.parametrize("budget", [2**30, 1], ids=["in memory", "streamed"])
def test_pickling(budget):
    loaded = load_image_dataset(table(PICTURES, LABELS), memory_budget=budget)
    again = pickle.loads(pickle.dumps(loaded))
    assert torch.equal(again[4]["image"], loaded[4]["image"]) and repr(again) == repr(loaded)


def test_items_and_batches():
    loaded = load_image_dataset(table(PICTURES, LABELS))
    item = loaded[4]
    assert item["image"].dtype == torch.uint8 and item["image"].shape == (3, 8, 8)
    assert type(item["label"]) is int and type(item["index"]) is int and item["label"] == 1
    batch = collate_images([loaded[i] for i in (4, 0)])
    assert batch["image"].shape == (2, 3, 8, 8) and batch["image"].dtype == torch.uint8
    assert batch["label"].tolist() == [1, 0] and batch["index"].tolist() == [4, 0]
    assert batch["label"].dtype == batch["index"].dtype == torch.int64
    assert "label" not in collate_images([load_image_dataset(table(PICTURES))[0]])
    for beyond in (6, -1):
        with pytest.raises(IndexError, match=r"0\.\.5"):
            loaded[beyond]


def test_subset_keeps_the_classes_it_misses():
    numbered = load_image_dataset(with_columns(label=(LABELS, INTEGER))).subset(torch.tensor([0, 3]))
    assert numbered.num_classes == 3 and numbered.labels.tolist() == [0, 0]
    assert numbered[1]["index"] == 1
    for wrong in ([6], [-1], [], [True, False], [0.5]):
        with pytest.raises(ValueError, match=r"integers in 0\.\.1"):
            numbered.subset(wrong)


def test_from_tensors():
    images = torch.randint(0, 256, (5, 3, 4, 6), dtype=torch.uint8)
    made = ImageDataset.from_tensors(images, torch.tensor([0, 1, 3, 0, 1], dtype=torch.int32))
    assert made.image_size == (4, 6) and made.num_classes == 4 and made.labels.dtype == torch.int64
    assert made.name == "tensors" and made.images.data_ptr() == images.data_ptr()
    assert ImageDataset.from_tensors(images, torch.zeros(5).long(), ["a", "b"]).num_classes == 2
    assert ImageDataset.from_tensors(images).num_classes is None
    for wrong in (images.float(), images[:, :1], images[0], images[:0]):
        with pytest.raises(ValueError, match=r"non-empty uint8 tensor \(N, 3, H, W\)"):
            ImageDataset.from_tensors(wrong)
    for labels in (torch.zeros(4).long(), torch.zeros(5)):
        with pytest.raises(ValueError, match="labels must be 5 integers"):
            ImageDataset.from_tensors(images, labels)
    for labels in (torch.tensor([0, 0, 0, 0, -1]), torch.tensor([0, 0, 0, 0, 2])):
        with pytest.raises(ValueError, match=r"labels must be in 0\.\.1"):
            ImageDataset.from_tensors(images, labels, ["a", "b"])


# Random subsets and order -------------------------------------------------------------------------------------------


def test_max_examples_is_stratified_nested_and_seeded():
    labels = [0] * 60 + [1] * 30 + [2] * 10
    source = table([PICTURES[0]] * 100, labels)
    chosen = load_image_dataset(source, max_examples=20)
    assert torch.bincount(chosen.labels).tolist() == [12, 6, 2]
    assert torch.bincount(load_image_dataset(source, max_examples=3).labels).tolist() == [1, 1, 1]
    assert len(load_image_dataset(source, max_examples=500)) == 100


def test_max_examples_depends_on_the_seed_and_on_nothing_else():
    source = table([picture(seed, (2, 2)) for seed in range(40)])
    torch.manual_seed(0)
    state, numpy_state = torch.get_rng_state(), np.random.get_state()[1].copy()
    first = load_image_dataset(source, max_examples=10, seed=1).images
    assert torch.equal(torch.get_rng_state(), state) and (np.random.get_state()[1] == numpy_state).all()
    torch.manual_seed(5)
    assert torch.equal(load_image_dataset(source, max_examples=10, seed=1).images, first)
    assert not torch.equal(load_image_dataset(source, max_examples=10, seed=2).images, first)
    larger = {image.numpy().tobytes() for image in load_image_dataset(source, max_examples=25, seed=1).images}
    assert {image.numpy().tobytes() for image in first} < larger


def test_max_examples_is_chosen_before_decoding():
    # With one good image among broken ones, only a choice made first can succeed.
    source = table([PICTURES[0]] + [b"broken"] * 9, [0] + [1] * 9)
    outcomes = []
    for seed in range(30):
        try:
            outcomes.append(len(load_image_dataset(source, label_column="none", max_examples=1, seed=seed)))
        except ValueError:
            outcomes.append(0)
    assert set(outcomes) == {0, 1}


def test_the_order_of_an_epoch_is_a_pure_function_of_seed_and_epoch():
    torch.manual_seed(3)
    state = torch.get_rng_state()
    first = epoch_order(50, 0, 4)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(99)
    assert torch.equal(epoch_order(50, 0, 4), first) and sorted(first.tolist()) == list(range(50))
    orders = {tuple(epoch_order(50, seed, epoch).tolist()) for seed in range(4) for epoch in range(4)}
    assert len(orders) == 16, "also (0, 1) and (1, 0) differ"


# Digits, arguments, imports -----------------------------------------------------------------------------------------


def test_digits():
    train, test, everything = (load_image_dataset("digits", split) for split in ("train", "test", "all"))
    assert (len(train), len(test), len(everything)) == (1437, 360, 1797)
    assert train.images.shape == (1437, 3, 32, 32) and train.images.dtype == torch.uint8
    assert train.images.max() > 250 and torch.equal(train.images[:, 0], train.images[:, 2])
    assert train.label_names == tuple("0123456789") and train.name == "digits"
    assert (torch.bincount(test.labels) - 36).abs().max() <= 1
    rows = {image.numpy().tobytes() for image in train.images}
    assert not rows & {image.numpy().tobytes() for image in test.images}
    assert torch.equal(load_image_dataset("digits", "test").images, test.images)
    assert load_image_dataset("digits", image_size=8).image_size == (8, 8)
    few = load_image_dataset("digits", max_examples=20)
    assert torch.bincount(few.labels).tolist() == [2] * 10
    with pytest.raises(ValueError, match="'digits' has no split 'validation': available splits: train, test, all"):
        load_image_dataset("digits", "validation")


def test_digits_are_the_pixels_of_scikit_learn():
    from sklearn.datasets import load_digits

    native = load_image_dataset("digits", "all", image_size=8)
    expected = (load_digits().images * 255 / 16).round()
    assert abs(native.images[:, 0].numpy() - expected).max() == 0
    assert native.labels.tolist() == load_digits().target.tolist()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"on_error": "ignore"}, "on_error must be"),
        ({"image_size": 0}, "image_size must be"),
        ({"image_size": 0.5}, "image_size must be"),
        ({"max_examples": 0}, "max_examples must be"),
    ],
)
def test_arguments_are_checked_first(options, message):
    with pytest.raises(ValueError, match=message):
        load_image_dataset("nobody/nothing", **options)


def test_import_is_light():
    code = "import sys, hf_robust.data; print([m for m in ('datasets', 'sklearn', 'matplotlib') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"


def test_classes_of_another_split_are_matched_by_name():
    images = torch.zeros(4, 3, 8, 8, dtype=torch.uint8)
    train = ImageDataset.from_tensors(images[:3], torch.tensor([0, 1, 2]), ("cat", "dog", "eel"))
    test = ImageDataset.from_tensors(images, torch.tensor([0, 1, 0, 1]), ("dog", "eel"))
    matched = test.numbered_as(train)
    assert matched.labels.tolist() == [1, 2, 1, 2] and matched.label_names == train.label_names
    assert matched.num_classes == 3 and len(matched) == 4
    assert train.numbered_as(train) is train
    with pytest.raises(ValueError, match=r"classes \['cat'\] that the training images do not have"):
        train.numbered_as(test)
    bare = ImageDataset.from_tensors(images, torch.tensor([0, 1, 0, 1]))
    assert bare.numbered_as(train) is bare
    with pytest.raises(ValueError, match="has the class 3, the training images have 3 classes"):
        ImageDataset.from_tensors(images, torch.tensor([0, 1, 2, 3])).numbered_as(train)


def test_other_labels_on_the_same_images():
    data = ImageDataset.from_tensors(
        torch.zeros(3, 3, 8, 8, dtype=torch.uint8), torch.tensor([0, 1, 2]), ("a", "b", "c")
    )
    other = data.relabelled(torch.tensor([1, 0, 1]))
    assert other.labels.tolist() == [1, 0, 1] and other.num_classes == 2 and other.label_names is None
    assert data.labels.tolist() == [0, 1, 2]
    with pytest.raises(ValueError, match="labels must be 3 integers from 0"):
        data.relabelled(torch.tensor([0, 1]))
