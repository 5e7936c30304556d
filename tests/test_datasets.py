"""MNIST: the embedded copy, folders of idx files, and what damage looks like."""

import gzip
import shutil
import struct

import jaxtyping
import numpy as np
import pytest
import torch

from saeutils import datasets
from saeutils.datasets import ImageData, mnist

STEMS = {"images": "images-idx3-ubyte", "labels": "labels-idx1-ubyte"}


def idx(array: np.ndarray) -> bytes:
    return struct.pack(f">4B{array.ndim}I", 0, 0, 8, array.ndim, *array.shape) + (
        array.astype(np.uint8).tobytes()
    )


def write_folder(folder, n, prefix="train", n_labels=None, opener=open, suffix=""):
    rng = np.random.default_rng(n)
    images = rng.integers(0, 256, (n, 28, 28))
    labels = rng.integers(0, 10, n if n_labels is None else n_labels)
    for kind, array in {"images": images, "labels": labels}.items():
        with opener(folder / f"{prefix}-{STEMS[kind]}{suffix}", "wb") as f:
            f.write(idx(array))
    return images, labels


@pytest.fixture(scope="module")
def train():
    return mnist("train")


@pytest.fixture(scope="module")
def test():
    return mnist("test")


def test_embedded_train_split_is_the_real_one(train):
    assert train.images.shape == (60_000, 28, 28)
    # Published counts of the digits, and the mean that every tutorial normalises by.
    counts = [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949]
    assert train.labels.bincount().tolist() == counts
    assert train.images.double().mean() / 255 == pytest.approx(0.1306604762738429)
    assert train.labels[:5].tolist() == [5, 0, 4, 1, 9]
    assert train.ids.tolist() == list(range(60_000))


def test_embedded_test_split_continues_the_ids(train, test):
    assert test.labels[:5].tolist() == [7, 2, 1, 0, 4]
    assert test.ids.tolist() == list(range(60_000, 70_000))
    assert (test.split, test.name, len(test)) == ("test", "mnist", 10_000)
    assert test.fingerprint != train.fingerprint


def test_pixels_are_rows_between_0_and_1(test):
    pixels = test.take(slice(0, 10)).pixels
    assert pixels.shape == (10, 784)
    assert pixels.min() == 0 and pixels.max() == 1
    assert torch.equal((pixels * 255).round().byte(), test.images[:10].flatten(1))


@pytest.mark.parametrize(
    "index", [[5, 1, 5], np.array([5, 1, 5]), torch.tensor([5, 1, 5])]
)
def test_a_subset_keeps_its_ids(test, index):
    subset = test.take(index)
    assert subset.ids.tolist() == [60_005, 60_001, 60_005]
    assert torch.equal(subset.labels, test.labels[torch.tensor([5, 1, 5])])
    assert torch.equal(subset.images, test.images[torch.tensor([5, 1, 5])])


def test_a_subset_by_mask(test):
    sevens = test.take(test.labels == 7)
    assert len(sevens) == 1028 and set(sevens.labels.tolist()) == {7}


def test_fingerprint_sees_images_labels_ids_and_nothing_else(test):
    a = test.take(slice(0, 100))
    assert a.fingerprint == test.take(list(range(100))).fingerprint
    assert len(a.fingerprint) == 64
    for field in ("images", "labels", "ids"):
        changed = {f: getattr(a, f).clone() for f in ("images", "labels", "ids")}
        changed[field].view(-1)[-1] += 1
        other = ImageData(**changed, split=a.split, name=a.name)
        assert other.fingerprint != a.fingerprint, field


@pytest.mark.parametrize(("opener", "suffix"), [(open, ""), (gzip.open, ".gz")])
@pytest.mark.parametrize("n", [1, 7])
def test_a_folder_of_idx_files(tmp_path, opener, suffix, n):
    images, labels = write_folder(tmp_path, n, opener=opener, suffix=suffix)
    data = mnist("train", tmp_path)
    assert (data.images.numpy() == images).all()
    assert (data.labels.numpy() == labels).all()
    assert data.name == tmp_path.name
    write_folder(tmp_path, n, prefix="t10k", opener=opener, suffix=suffix)
    assert mnist("test", tmp_path).ids.tolist() == list(range(60_000, 60_000 + n))


def test_the_dotted_spelling_is_found(tmp_path):
    write_folder(tmp_path, 3)
    for path in list(tmp_path.iterdir()):
        path.rename(tmp_path / path.name.replace("-idx", ".idx"))
    assert len(mnist("train", tmp_path)) == 3


def test_test_ids_start_after_a_larger_train_split(tmp_path):
    write_folder(tmp_path, 2, prefix="t10k")
    header = struct.pack(">4B3I", 0, 0, 8, 3, 70_123, 28, 28)
    (tmp_path / "train-images-idx3-ubyte").write_bytes(header)
    assert mnist("test", tmp_path).ids.tolist() == [70_123, 70_124]


def test_wrong_split():
    with pytest.raises(ValueError, match="'valid'"):
        mnist("valid")


def test_missing_file_and_missing_folder(tmp_path, monkeypatch):
    write_folder(tmp_path, 2)
    (tmp_path / "train-labels-idx1-ubyte").unlink()
    with pytest.raises(FileNotFoundError, match="train-labels-idx1-ubyte"):
        mnist("train", tmp_path)
    monkeypatch.setenv("SAEUTILS_DATA", str(tmp_path / "nowhere"))
    with pytest.raises(FileNotFoundError, match=r"SAEUTILS_DATA.*git clone"):
        mnist("train")


def test_labels_of_another_length(tmp_path):
    write_folder(tmp_path, 5, n_labels=4)
    with pytest.raises(ValueError, match=r"5 images but .* 4 labels"):
        mnist("train", tmp_path)


def test_empty_data(tmp_path):
    write_folder(tmp_path, 0)
    with pytest.raises(ValueError, match="no image"):
        mnist("train", tmp_path)


@pytest.mark.parametrize("keep", [0, 3, 10, 100])
def test_truncated_idx_is_named(tmp_path, keep):
    write_folder(tmp_path, 2)
    path = tmp_path / "train-images-idx3-ubyte"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ValueError, match="train-images-idx3-ubyte"):
        mnist("train", tmp_path)


def test_truncated_gz_is_named(tmp_path):
    write_folder(tmp_path, 2, opener=gzip.open, suffix=".gz")
    path = tmp_path / "train-images-idx3-ubyte.gz"
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(ValueError, match=r"train-images-idx3-ubyte\.gz is damaged"):
        mnist("train", tmp_path)


def test_swapped_files_and_other_sizes(tmp_path):
    write_folder(tmp_path, 2)
    images = tmp_path / "train-images-idx3-ubyte"
    labels = images.with_name("train-labels-idx1-ubyte")
    content = images.read_bytes()
    shutil.copy(labels, images)
    with pytest.raises(ValueError, match="not an idx file"):
        mnist("train", tmp_path)
    images.write_bytes(idx(np.zeros((2, 32, 32))))
    with pytest.raises(ValueError, match="32 × 32"):
        mnist("train", tmp_path)
    images.write_bytes(content)
    assert len(mnist("train", tmp_path)) == 2


@pytest.mark.parametrize("how", ["flip a bit", "truncate", "swap", "remove"])
def test_damage_to_the_embedded_copy_is_found(tmp_path, monkeypatch, how):
    folder = shutil.copytree(datasets.data_folder() / "mnist", tmp_path / "mnist")
    path = folder / "t10k-labels-idx1-ubyte.xz"
    content = bytearray(path.read_bytes())
    if how == "flip a bit":
        content[len(content) // 2] ^= 4
        path.write_bytes(content)
    elif how == "truncate":
        path.write_bytes(content[:-100])
    elif how == "swap":
        with gzip.open(path.with_suffix(".gz"), "wb") as f:  # other labels, valid file
            f.write(idx(np.zeros(10_000)))
        path.unlink()
    else:
        path.unlink()
    monkeypatch.setenv("SAEUTILS_DATA", str(tmp_path))
    expected = FileNotFoundError if how == "remove" else ValueError
    with pytest.raises(expected, match=r"t10k-labels-idx1-ubyte") as error:
        mnist("test")
    assert "data/mnist" in str(error.value) or "make_mnist" in str(error.value)


def test_image_data_of_unequal_lengths(monkeypatch):
    # What a user sees: the shape checker of the test suite would speak up first.
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    with pytest.raises(ValueError, match="3 images, 2 labels and 3 ids"):
        ImageData(
            torch.zeros(3, 28, 28, dtype=torch.uint8),
            torch.zeros(2, dtype=torch.int64),
            torch.arange(3),
            "train",
            "x",
        )


# --- FashionMNIST ---------------------------------------------------------


@pytest.fixture
def no_package(monkeypatch, tmp_path):
    """As on a machine without the Debian package."""
    monkeypatch.setattr(datasets, "FASHION_PACKAGE", tmp_path / "not installed")


def test_the_fashion_sample_says_that_it_is_one(no_package, capsys):
    train, test = (datasets.fashion_mnist(split) for split in ("train", "test"))
    assert train.images.shape == (3000, 28, 28) and len(test) == 600
    assert train.name == test.name == "fashion_mnist (sample)"
    said = capsys.readouterr().out
    assert "sample of 3,000 train images" in said
    assert "apt-get install dataset-fashion-mnist" in said
    assert train.ids[[0, -1]].tolist() == [0, 2999]
    assert test.ids[[0, -1]].tolist() == [60_000, 60_599]
    # As published: an ankle boot first, and ten classes about equally often.
    assert datasets.FASHION_CLASSES[train.labels[0]] == "ankle boot"
    assert train.labels[:5].tolist() == [9, 0, 0, 3, 0]
    assert train.labels.bincount().min() > 250 and len(train.labels.unique()) == 10


def test_whole_fashion_is_read_where_it_is(tmp_path, monkeypatch, capsys):
    images, _ = write_folder(tmp_path, 7, opener=gzip.open, suffix=".gz")
    monkeypatch.setattr(datasets, "FASHION_PACKAGE", tmp_path)
    data = datasets.fashion_mnist("train")
    assert (data.images.numpy() == images).all() and data.name == "fashion_mnist"
    assert f"7 train images from {tmp_path}" in capsys.readouterr().out


def test_a_folder_of_fashion_comes_first(tmp_path, no_package):
    images, _ = write_folder(tmp_path, 3, prefix="t10k")
    data = datasets.fashion_mnist("test", tmp_path)
    assert (data.images.numpy() == images).all()
    with pytest.raises(FileNotFoundError, match="train-images"):
        datasets.fashion_mnist("train", tmp_path)


def test_damage_to_the_fashion_sample_is_found(tmp_path, no_package, monkeypatch):
    source = datasets.data_folder() / "fashion_mnist"
    folder = shutil.copytree(source, tmp_path / "fashion_mnist")
    path = folder / "t10k-labels-idx1-ubyte.xz"
    with gzip.open(path.with_suffix(".gz"), "wb") as f:
        f.write(idx(np.zeros(600)))
    path.unlink()
    monkeypatch.setenv("SAEUTILS_DATA", str(tmp_path))
    with pytest.raises(ValueError, match=r"scripts/make_fashion_mnist\.py"):
        datasets.fashion_mnist("test")


@pytest.mark.skipif(
    not datasets.FASHION_PACKAGE.is_dir(), reason="dataset-fashion-mnist not installed"
)
def test_the_sample_is_the_beginning_of_the_whole():
    whole = datasets.fashion_mnist("train")
    sample = mnist("train", datasets.data_folder() / "fashion_mnist")
    assert len(whole) == 60_000
    assert torch.equal(whole.images[:3000], sample.images)
    assert torch.equal(whole.labels[:3000], sample.labels)
