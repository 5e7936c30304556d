"""Make data/fashion_mnist/*.xz, the sample of FashionMNIST that the collection carries.

    apt-get install dataset-fashion-mnist       # all 70,000 images, 30 MB
    python scripts/make_fashion_mnist.py
    python scripts/make_fashion_mnist.py path/to/idx/files

Takes the first images of each split, in order, so that an image of the sample has the
same number in the whole set. Checks the sha256 of the whole files first, and after
writing reads every file back. The same liblzma writes the same bytes each time.
"""

import argparse
import hashlib
import lzma
import struct
import sys
from pathlib import Path

from saeutils.datasets import FASHION_PACKAGE, _find_idx, _read

KEPT = {"train": 3_000, "t10k": 600}
# sha256 of the four whole idx files, uncompressed.
WHOLE = {
    "train-images-idx3-ubyte": (
        "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888"
    ),
    "train-labels-idx1-ubyte": (
        "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9"
    ),
    "t10k-images-idx3-ubyte": (
        "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b"
    ),
    "t10k-labels-idx1-ubyte": (
        "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34"
    ),
}
FILTERS = [
    {
        "id": lzma.FILTER_LZMA2,
        "preset": 9 | lzma.PRESET_EXTREME,
        "lc": 4,
        "lp": 0,
        "pb": 0,
    }
]


def beginning(content: bytes, n: int) -> bytes:
    """The idx file with its first n items alone."""
    n_dims = content[3]
    total, *shape = struct.unpack(f">{n_dims}I", content[4 : 4 + 4 * n_dims])
    header = 4 + 4 * n_dims
    each = (len(content) - header) // total
    return b"".join(
        [
            content[:4],
            struct.pack(f">{n_dims}I", n, *shape),
            content[header : header + n * each],
        ]
    )


def make(source: Path, out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    for name, sha256 in WHOLE.items():
        whole = _read(_find_idx(source, name))
        if hashlib.sha256(whole).hexdigest() != sha256:
            sys.exit(f"{source} does not hold the original {name}: wrong checksum")
        content = beginning(whole, KEPT[name.split("-")[0]])
        packed = lzma.compress(content, filters=FILTERS)
        target = out / f"{name}.xz"
        target.write_bytes(packed)
        if lzma.decompress(target.read_bytes()) != content:
            sys.exit(f"{target} does not decompress to what went in")
        of_content, of_file = (hashlib.sha256(b).hexdigest() for b in (content, packed))
        print(f"{target}: {len(content):,} -> {len(packed):,} bytes")
        print(f"  sha256 {of_content} unpacked, {of_file} packed", flush=True)


DEFAULT_OUT = Path(__file__).resolve().parent.parent / "data" / "fashion_mnist"

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "folder", nargs="?", type=Path, default=FASHION_PACKAGE, help="the idx files"
    )
    parser.add_argument("--out", type=Path, default=DEFAULT_OUT)
    args = parser.parse_args()
    make(args.folder, args.out)
