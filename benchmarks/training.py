"""Training speed and memory against the libraries people use: ratios, not seconds.

    make bench ARGS="training"                everything below, about ten minutes
    python benchmarks/training.py --sizes 512x4096x32x4096 --rounds 5

Every trainer runs in a process of its own and does the same steps on the same rows;
rounds are interleaved, and medians of the rounds are compared, so that a busy
machine slows all alike. Memory is the peak above imports and data. eai-sparsify and
dictionary_learning join when `make bench-env` has built their environment.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
PEERS = HERE.parent / ".venv-bench/bin/python"
SIZES = ["512x4096x32x4096", "128x1024x32x1024"]
SCALING = [f"512x{2**i * 1024}x32x4096" for i in range(6)]


class Worker:
    """A trainer in its own process."""

    def __init__(self, name: str, sizes: dict) -> None:
        python = (
            PEERS if name in ("sparsify", "dictionary_learning") else sys.executable
        )
        threads = str(sizes["threads"])
        self.process = subprocess.Popen(
            [python, HERE / "trainers.py", name, json.dumps(sizes)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            env={"OMP_WAIT_POLICY": "passive"}  # for all alike; see saeutils.training
            | os.environ
            | {"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads},
        )  # fmt: skip
        for line in self.process.stdout:  # some libraries print when imported
            if line == "ready\n":
                return
        raise RuntimeError(f"{name} did not start: exit code {self.process.wait()}")

    def ask(self, message: str) -> float:
        self.process.stdin.write(message + "\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline()
        if not answer:
            raise RuntimeError(f"the trainer ended: exit code {self.process.wait()}")
        return float(answer)


def measure(
    names: list[str], size: str, rounds: int, threads: int, device: str
) -> dict:
    """{name: (median seconds a step, peak MiB)} of one size, interleaved."""
    d_in, d_sae, k, batch = map(int, size.split("x"))
    sizes = dict(
        d_in=d_in, d_sae=d_sae, k=k, batch=batch, threads=threads, device=device
    )
    workers = {name: Worker(name, sizes) for name in names}
    slowest = max(worker.ask("2") for worker in workers.values()) / 2
    steps = max(1, min(50, round(1.0 / slowest)))
    seconds = {name: [] for name in names}
    for _ in range(rounds):
        for name, worker in workers.items():
            seconds[name].append(worker.ask(str(steps)) / steps)
    return {n: (statistics.median(seconds[n]), w.ask("")) for n, w in workers.items()}


def table(found: dict, batch: int, base: str = "sae_lens") -> None:
    print(f"{'trainer':20} ms a step  rows a s    speed  peak MiB")
    for name, (seconds, peak) in found.items():
        speed, rate = found[base][0] / seconds, batch / seconds
        print(
            f"{name:20}{seconds * 1e3:>10.1f}{rate:>10.0f}{speed:>8.2f}×{peak:>10.0f}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--sizes", nargs="*", default=SIZES, help="d_in x d_sae x k x batch"
    )
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--no-scaling", action="store_true")
    parser.add_argument("--bf16", action="store_true", help="also the bfloat16 encoder")
    args = parser.parse_args()

    names = ["sae_lens", "dense_torch", "ours"]
    if args.device == "cpu":
        names.append("ours_torch")
    if args.bf16:
        names.append("ours_bf16")
    if PEERS.exists():
        names += ["sparsify", "dictionary_learning"]
    else:
        print("eai-sparsify and dictionary_learning are left out: run `make bench-env`")
    machine = platform.processor() or platform.machine()
    print(f"{machine}, {args.threads} thread(s), {args.device}")
    for size in args.sizes:
        print(f"\nd_in x d_sae x k x batch = {size}, {args.rounds} interleaved rounds")
        table(
            measure(names, size, args.rounds, args.threads, args.device),
            int(size.split("x")[3]),
        )
    if args.no_scaling:
        return
    print("\nHow it scales: a step against its encoder's product alone")
    print("  d_sae   ours ms  encode ms   ratio  peak MiB  sae_lens MiB")
    for size in SCALING:
        d_sae = int(size.split("x")[1])
        names = ["ours", "encode_only"] + ["sae_lens"] * (d_sae == 16384)
        found = measure(
            names, size, max(3, args.rounds // 2), args.threads, args.device
        )
        (mine, peak), (bound, _) = found["ours"], found["encode_only"]
        theirs = f"{found['sae_lens'][1]:.0f}" if "sae_lens" in found else ""
        print(
            f"{d_sae:>7}{mine * 1e3:>10.1f}{bound * 1e3:>11.1f}{mine / bound:>8.2f}"
            f"{peak:>10.0f}{theirs:>14}"
        )
    if args.device == "cpu" and (os.cpu_count() or 1) > 1 and args.threads == 1:
        print("\nTwo threads against one")
        one = measure(["ours"], SIZES[0], args.rounds, 1, "cpu")["ours"][0]
        two = measure(["ours"], SIZES[0], args.rounds, 2, "cpu")["ours"][0]
        print(f"{SIZES[0]}: {one / two:.2f}×")


if __name__ == "__main__":
    main()
