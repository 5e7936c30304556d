"""A run folder: what was trained, on what, how far, and the result.

    run.json                 config, data fingerprint, versions; written first
    checkpoint.safetensors   all that the next step depends on; replaced atomically
    history.parquet          loss curves          ┐
    sae/                     the finished SAE     │ written at the end
    scorecard.json           with `eval_rows`     ┘

A run is bound to its config and its data: a folder that belongs to others is refused.
"""

import json
import os
import platform
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from saeutils import sae as sae_format

CHECKPOINT, RUN = "checkpoint.safetensors", "run.json"


@dataclass(frozen=True)
class Checkpoint:
    """Tensors, and JSON values, of a run between two steps."""

    tensors: dict[str, Tensor]
    scalars: dict


class Run:
    """A run folder, new or to be resumed (then `checkpoint` is not None).

    Raises: ValueError when the folder belongs to another config or other data, or is
        no run folder at all. Nothing is written in that case.
    """

    def __init__(self, path: str | Path, config, store, rank: int = 0) -> None:
        self.path = Path(path)
        mine = {
            "config": json.loads(json.dumps(asdict(config))),
            "data": {
                "fingerprint": store.fingerprint,
                "rows": len(store),
                "d_in": store.d_in,
            },
        }
        if (self.path / RUN).exists():
            self._refuse_other(json.loads((self.path / RUN).read_text()), mine)
        elif self.path.exists() and any(self.path.iterdir()):
            raise ValueError(
                f"{self.path} is not empty and holds no {RUN}: choose a new folder"
            )
        elif rank == 0:
            self.path.mkdir(parents=True, exist_ok=True)
            _write(
                self.path / RUN,
                json.dumps(mine | {"versions": versions()}, indent=1).encode(),
            )
        self.checkpoint = self._load() if (self.path / CHECKPOINT).exists() else None

    def _refuse_other(self, theirs: dict, mine: dict) -> None:
        for part in ("config", "data"):
            changed = [n for n in mine[part] if theirs[part].get(n) != mine[part][n]]
            if changed:
                details = ", ".join(
                    f"{n}: {theirs[part].get(n)} there, {mine[part][n]} here"
                    for n in changed
                )
                raise ValueError(
                    f"{self.path} is the run of another {part} ({details}); "
                    "choose a new folder, or delete that one"
                )

    def save_checkpoint(self, checkpoint: Checkpoint) -> None:
        """Replace the checkpoint; a kill at any instant leaves the old or the new."""
        from safetensors.torch import save

        tensors = {n: t.cpu().contiguous() for n, t in checkpoint.tensors.items()}
        _write(
            self.path / CHECKPOINT,
            save(tensors, {"scalars": json.dumps(checkpoint.scalars)}),
        )

    def _load(self) -> Checkpoint:
        from safetensors import safe_open

        with safe_open(self.path / CHECKPOINT, "pt") as file:
            scalars = json.loads(file.metadata()["scalars"])
            return Checkpoint({n: file.get_tensor(n) for n in file.keys()}, scalars)

    def save_result(self, result) -> None:
        """Write history and SAE; those of an earlier, interrupted end are replaced."""
        result.history.to_parquet(self.path / "history.parquet.new")
        os.replace(self.path / "history.parquet.new", self.path / "history.parquet")
        if result.held_out:
            card = json.dumps(result.scorecard.row(), indent=1)
            _write(self.path / "scorecard.json", card.encode())
        if (self.path / "sae").exists():
            shutil.rmtree(self.path / "sae")
        sae_format.save(result.sae, self.path / "sae")


def tensorboard(path: str | Path) -> Callable[[dict], None]:
    """A `callback` of `train` that writes each row of the history for TensorBoard.

    Weights & Biases needs no helper: `callback=wandb.log`.
    """
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(str(path))

    def callback(row: dict) -> None:
        for name, value in row.items():
            if name not in ("step", "run"):
                tag = f"{row['run']}/{name}" if "run" in row else name
                writer.add_scalar(tag, value, row["step"])
        writer.flush()

    return callback


def versions() -> dict[str, str]:
    """Of Python and the packages that decide a result."""
    from importlib.metadata import PackageNotFoundError, version

    found = {"python": platform.python_version(), "torch": torch.__version__}
    for package in ("saeutils", "numpy", "numba", "sae-lens"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


def _write(path: Path, content: bytes) -> None:
    """Write a file so that it is there whole, or not at all."""
    new = path.with_name(path.name + ".new")
    with open(new, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(new, path)
