"""Codes of a million rows × 32,768 latents, under an address-space limit of 2 GiB.

    python benchmarks/codes.py                  # about five minutes on one core
    python benchmarks/codes.py --rows 100000
    python benchmarks/codes.py --speed          # our encoding against sae_lens' own

Dense, these codes would take 131 GB. Prints what was written and how fast it is read
back by rows and by columns; a MemoryError means that the promise is broken.
"""

import argparse
import os
import resource
import tempfile
import time
from pathlib import Path
from statistics import median

import numpy as np
import torch

from saeutils.codes import DENSE_BYTES, encode
from saeutils.sae import as_codes, encode_sparse
from saeutils.store import ActivationStore, StoreWriter

D_IN, D_SAE, K = 64, 32_768, 32
LIMIT = 2 * 2**30


class TopK:
    """z = the k largest of relu(x Wᵀ)."""

    def __init__(self) -> None:
        self.W_dec = torch.randn(D_SAE, D_IN) / D_IN**0.5

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        top = (x @ self.W_dec.T).topk(K, sorted=False)
        z = torch.zeros(len(x), D_SAE)
        return z.scatter_(1, top.indices, top.values.relu_())


def speed(rounds: int = 5) -> None:
    """CPU seconds of a TopKSAE's codes, made sparse, against those of the kernels."""
    from sae_lens import TopKSAE, TopKSAEConfig

    for d_in, d_sae, k in ((128, 1024, 16), (D_IN, D_SAE, K)):
        config = TopKSAEConfig(d_in=d_in, d_sae=d_sae, k=k, device="cpu")
        sae = TopKSAE(config).requires_grad_(False)
        x = torch.randn(DENSE_BYTES // (4 * d_sae), d_in)
        tasks = {"its own": lambda: as_codes(sae.encode(x))}  # noqa: B023
        tasks["ours"] = lambda: encode_sparse(sae, x)  # noqa: B023
        seconds = {name: [] for name in tasks}
        for round_ in range(rounds + 1):
            for name, task in tasks.items():
                began = time.process_time()
                task()
                if round_:
                    seconds[name].append(time.process_time() - began)
        own, ours = (median(values) for values in seconds.values())
        print(f"{d_in} → {d_sae}, k {k}: {own / ours:.1f} × as fast as sae.encode")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--speed", action="store_true", help="only against sae_lens")
    arguments = parser.parse_args()
    n = arguments.rows
    torch.set_num_threads(1)
    if arguments.speed:
        return speed()
    # pyarrow's own allocator reserves 1 GiB of addresses beforehand, used or not.
    os.environ["ARROW_DEFAULT_MEMORY_POOL"] = "system"
    resource.setrlimit(resource.RLIMIT_AS, (LIMIT, LIMIT))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder)
        with StoreWriter(path / "rows", hook="x", d_in=D_IN, dtype="float16") as writer:
            for start in range(0, n, 50_000):
                m = min(50_000, n - start)
                ids = np.arange(start, start + m)
                writer.append(torch.randn(m, D_IN), {"id": ids})
        began = time.perf_counter()
        store = ActivationStore.open(path / "rows")
        codes = encode(TopK(), store, path / "codes", dtype="float16")
        print(f"{codes}\nencoded in {time.perf_counter() - began:.0f} s")
        size = sum(f.stat().st_size for f in (path / "codes").glob("*.npy"))
        ideal = codes.nnz * (2 + 2)
        print(
            f"{size / 1e6:.0f} MB on disk, {size / ideal:.3f} × nnz × (index + value)"
        )
        began = time.perf_counter()
        codes.column(0)
        print(f"sorted by latent in {time.perf_counter() - began:.1f} s")
        began = time.perf_counter()
        entries = sum(len(codes.column(latent).rows) for latent in range(D_SAE))
        assert entries == codes.nnz
        print(f"all columns read in {time.perf_counter() - began:.1f} s")
        began = time.perf_counter()
        entries = sum(len(batch.codes.values) for batch in codes.chunks(4096))
        assert entries == codes.nnz
        seconds = time.perf_counter() - began
        print(f"all rows read in {seconds:.1f} s ({n / seconds / 1e6:.2f} M rows/s)")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"at most {peak:.2f} GiB resident, {LIMIT / 2**30:.0f} GiB addressable")


if __name__ == "__main__":
    main()
