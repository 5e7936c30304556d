"""Real data with stable ids: MNIST and FashionMNIST, embedded or from idx files.

An item of data keeps the id it was born with. Ids travel with rows through
activations, stores and plots, so that nothing is ever joined by position.
"""

import gzip
import hashlib
import lzma
import math
import os
import zlib
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float32, Int64, UInt8
from torch import Tensor

# sha256 of the four idx files, uncompressed, as published by LeCun, Cortes and Burges.
MNIST_SHA256 = {
    "train-images-idx3-ubyte": (
        "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db"
    ),
    "train-labels-idx1-ubyte": (
        "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5"
    ),
    "t10k-images-idx3-ubyte": (
        "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7"
    ),
    "t10k-labels-idx1-ubyte": (
        "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2"
    ),
}
# sha256 of the embedded sample of FashionMNIST: the first images of each split.
FASHION_SHA256 = {
    "train-images-idx3-ubyte": (
        "85a0ed91fc149c8f56cbcd4faffd965abbddf9bb83d5e7308ec20af22a3a8c87"
    ),
    "train-labels-idx1-ubyte": (
        "d91bcde777777d8b779ccfade8da8df64050ef1cde830c67b3036ee13e26ec28"
    ),
    "t10k-images-idx3-ubyte": (
        "dd7352bf5542ceb429297852ae5ba0ed191090c0fc57e2d7307df21955153772"
    ),
    "t10k-labels-idx1-ubyte": (
        "7093c2bc3dd1adcb3356d70404acfbbc8f57a6d347bcbda973af279217a21272"
    ),
}
#: Where Debian's package dataset-fashion-mnist puts all 70,000.
FASHION_PACKAGE = Path("/usr/share/datasets/fashion-mnist")
FASHION_CLASSES = (
    *("T-shirt", "trouser", "pullover", "dress", "coat"),
    *("sandal", "shirt", "sneaker", "bag", "ankle boot"),
)
_PREFIX = {"train": "train", "test": "t10k"}
_OPENERS = {"": open, ".gz": gzip.open, ".xz": lzma.open}
_TRAIN_SIZE = 60_000


@dataclass(frozen=True, eq=False)
class ImageData:
    """Labelled grey images. `ids` are stable: a subset keeps the ids of its parent.

    MNIST: ids 0..59999 are the train split, 60000..69999 the test split.
    """

    images: UInt8[Tensor, "n height width"]
    labels: Int64[Tensor, " n"]
    ids: Int64[Tensor, " n"]
    split: str
    name: str

    def __post_init__(self) -> None:
        n = len(self.images)
        if not len(self.labels) == len(self.ids) == n:
            raise ValueError(
                f"{n} images, {len(self.labels)} labels and {len(self.ids)} ids: "
                "each image needs one label and one id"
            )
        if n == 0:
            raise ValueError(f"{self.name} ({self.split}) holds no image")

    def __len__(self) -> int:
        return len(self.images)

    @cached_property
    def fingerprint(self) -> str:
        """sha256 (hex) over shape, images, labels and ids: equal means equal data."""
        digest = hashlib.sha256(repr(tuple(self.images.shape)).encode())
        for part in (self.images, self.labels, self.ids):
            array = part.contiguous().numpy()
            little_endian = array.astype(array.dtype.newbyteorder("<"), copy=False)
            digest.update(little_endian.data)
        return digest.hexdigest()

    @property
    def pixels(self) -> Float32[Tensor, "n pixels"]:
        """Images as rows of height × width floats, 0 (paper) to 1 (ink)."""
        return self.images.flatten(1).float() / 255

    def take(self, index: Tensor | np.ndarray | slice | list[int]) -> "ImageData":
        """The items at `index` (positions or a boolean mask), with their ids."""
        if isinstance(index, list):
            index = torch.tensor(index, dtype=torch.int64)
        elif isinstance(index, np.ndarray):
            index = torch.from_numpy(index)
        return ImageData(
            self.images[index],
            self.labels[index],
            self.ids[index],
            self.split,
            self.name,
        )


def data_folder() -> Path:
    """Folder of the embedded data: $SAEUTILS_DATA, else `data/` of the checkout.

    Raises FileNotFoundError when neither is there, as after an installation
    without a checkout.
    """
    if os.environ.get("SAEUTILS_DATA"):
        folder, origin = Path(os.environ["SAEUTILS_DATA"]), "$SAEUTILS_DATA"
    else:
        folder = Path(__file__).resolve().parent.parent / "data"
        origin = "the checkout that saeutils is installed from"
    if not folder.is_dir():
        raise FileNotFoundError(
            f"no data folder at {folder} ({origin}). The embedded data come with the "
            "repository: git clone it and `pip install -e .` there, or set "
            "SAEUTILS_DATA to the `data` folder of a clone"
        )
    return folder


def mnist(split: str = "train", folder: str | Path | None = None) -> ImageData:
    """MNIST, 60,000 train or 10,000 test images of 28 × 28, with no network.

    Without `folder` the embedded copy is read and its checksums are verified. With
    `folder` the idx files there are read, plain, .gz or .xz: MNIST, FashionMNIST, or
    one's own data in that format, of any number of images. Test ids start at 60000,
    or after the last train id if the folder's train split is larger.

    Raises ValueError for a damaged file and FileNotFoundError for a missing one.
    Source: LeCun, Cortes and Burges, http://yann.lecun.com/exdb/mnist.
    """
    if folder is not None:
        return _from_folder(split, Path(folder))
    return _from_folder(split, data_folder() / "mnist", MNIST_SHA256)


def fashion_mnist(split: str = "train", folder: str | Path | None = None) -> ImageData:
    """FashionMNIST: articles of clothing, 28 × 28; names in `FASHION_CLASSES`.

    All 60,000 and 10,000 images where the idx files are: in `folder`, or where
    Debian's package dataset-fashion-mnist puts them. Else the embedded sample, the
    first 3,000 and 600, whose checksums are verified. Prints which it is, and so does
    `name`. Ids are those of the whole set: the sample is its beginning.

    Raises as `mnist`. Source: Xiao, Rasul and Vollgraf 2017 (MIT licence).
    """
    if folder is None and not FASHION_PACKAGE.is_dir():
        sample = _from_folder(split, data_folder() / "fashion_mnist", FASHION_SHA256)
        print(
            f"FashionMNIST: the embedded sample of {len(sample):,} {split} images. For "
            "all: apt-get install dataset-fashion-mnist, or fashion_mnist(split, "
            "folder) with the folder of the idx files"
        )
        return replace(sample, name="fashion_mnist (sample)")
    folder = FASHION_PACKAGE if folder is None else Path(folder)
    data = replace(_from_folder(split, folder), name="fashion_mnist")
    print(f"FashionMNIST: {len(data):,} {split} images from {folder}")
    return data


def _from_folder(
    split: str, folder: Path, sha256: dict[str, str] | None = None
) -> ImageData:
    """The idx files of one split; with checksums they are an embedded copy."""
    if split not in _PREFIX:
        raise ValueError(f'split is "train" or "test", got {split!r}')
    names = [
        f"{_PREFIX[split]}-{kind}-ubyte" for kind in ("images-idx3", "labels-idx1")
    ]
    paths = [_find_idx(folder, name) for name in names]
    contents = [_read(path) for path in paths]
    if sha256 is not None:
        for name, path, content in zip(names, paths, contents, strict=True):
            if hashlib.sha256(content).hexdigest() != sha256[name]:
                raise ValueError(
                    f"{path} is damaged: it does not hold the original {name}. "
                    f"`git checkout -- data/{folder.name}` or "
                    f"`python scripts/make_{folder.name}.py` restores it"
                )
    images = _parse_idx(paths[0], contents[0], ndim=3)
    labels = _parse_idx(paths[1], contents[1], ndim=1)
    if images.shape[1:] != (28, 28):
        raise ValueError(
            f"{paths[0]} holds images of {images.shape[1]} × {images.shape[2]}; "
            "expected 28 × 28"
        )
    if len(images) != len(labels):
        raise ValueError(
            f"{paths[0]} holds {len(images)} images but {paths[1]} holds "
            f"{len(labels)} labels: the two files do not belong together"
        )
    first = 0 if split == "train" else max(_TRAIN_SIZE, _count_train(folder))
    return ImageData(
        images=torch.from_numpy(images),
        labels=torch.from_numpy(labels.astype(np.int64)),
        ids=torch.arange(first, first + len(images)),
        split=split,
        name=folder.resolve().name,
    )


def _find_idx(folder: Path, name: str) -> Path:
    """The file of that name in either usual spelling, plain or compressed."""
    stem, dotted = name, name.replace("-idx", ".idx")
    candidates = [folder / (s + suffix) for s in (stem, dotted) for suffix in _OPENERS]
    for path in candidates:
        if path.is_file():
            return path
    raise FileNotFoundError(
        f"no {name} (or .gz, .xz) in {folder}. A folder of MNIST, FashionMNIST or your "
        "own data holds {train,t10k}-images-idx3-ubyte and -labels-idx1-ubyte; what is "
        "embedded comes back with `python scripts/make_mnist.py` or make_fashion_mnist"
    )


def _read(path: Path, size: int = -1) -> bytes:
    try:
        with _OPENERS[path.suffix if path.suffix in _OPENERS else ""](path, "rb") as f:
            return f.read(size)
    except (EOFError, gzip.BadGzipFile, lzma.LZMAError, zlib.error) as error:
        raise ValueError(
            f"{path} is damaged and cannot be decompressed ({error}); get it again "
            f"from where it came (embedded: `git checkout -- data/{path.parent.name}`)"
        ) from error


def _parse_idx(path: Path, content: bytes, ndim: int) -> np.ndarray:
    """The idx format: 0 0 type ndim, then ndim big-endian sizes, then the bytes."""
    header = 4 + 4 * ndim
    magic = bytes([0, 0, 8, ndim])
    if len(content) < header or content[:4] != magic:
        raise ValueError(
            f"{path} is not an idx file of unsigned bytes in {ndim} dimension(s): it "
            f"starts with {content[:4].hex()!r}, expected {magic.hex()!r}"
        )
    shape = tuple(int(s) for s in np.frombuffer(content, ">u4", ndim, offset=4))
    if len(content) - header != math.prod(shape):
        raise ValueError(
            f"{path} is truncated or damaged: its header promises {shape}, that is "
            f"{math.prod(shape)} bytes, and {len(content) - header} follow"
        )
    return np.frombuffer(content, np.uint8, offset=header).reshape(shape).copy()


def _count_train(folder: Path) -> int:
    """Number of train images, by the header alone; 0 when the file is not there."""
    try:
        path = _find_idx(folder, "train-images-idx3-ubyte")
    except FileNotFoundError:
        return 0
    return int.from_bytes(_read(path, 8)[4:8], "big")
