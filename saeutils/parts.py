"""One store written by several processes, each a part of the inputs.

A part is a store of its own, in the folder part-RRRRR-of-WWWWW of the store, with its
own manifest, lock and resume. When all parts are complete, whoever sees that writes
the manifest of the whole, which lists their shards where they lie. A lost process is
made up for by running its part again.
"""

from dataclasses import dataclass
from typing import Any

from saeutils.sharded import MANIFEST, as_json, read_manifest, refuse_changes
from saeutils.storage import Folder
from saeutils.store_writer import FORMAT, StoreWriter


@dataclass(frozen=True)
class Part:
    """Part `rank` of `world_size`: inputs start … stop − 1."""

    rank: int
    world_size: int
    start: int
    stop: int

    @classmethod
    def of(cls, n: int, batch_size: int, rank: int, world_size: int) -> "Part":
        """Equal parts of n inputs, cut between the batches of a single process."""
        if not 0 <= rank < world_size:
            raise ValueError(
                f"part {rank} of {world_size}: expected 0 … {world_size - 1}"
            )
        batches = -(-n // batch_size)
        start, stop = (batches * r // world_size * batch_size for r in (rank, rank + 1))
        return cls(rank, world_size, min(n, start), min(n, stop))

    @property
    def name(self) -> str:
        return f"part-{self.rank:05d}-of-{self.world_size:05d}"

    def folder(self, store: Folder) -> Folder:
        """Where this part of the store is written."""
        return store if self.world_size == 1 else store / self.name

    def is_sealed(self, store: Folder, whole: dict[str, Any]) -> bool:
        """Whether the whole is there already; ValueError if it is something else."""
        if self.world_size == 1 or not store.exists(MANIFEST):
            return False
        manifest = read_manifest(store, FORMAT)
        refuse_changes(store, manifest, whole, StoreWriter.identity)
        if not manifest["complete"]:
            raise ValueError(
                f"{store} was begun by a single process: finish it by one, or delete it"
            )
        return True

    def seal(self, store: Folder, whole: dict[str, Any]) -> bool:
        """Write the manifest of the whole if all parts are complete; says whether."""
        if self.world_size == 1:
            return True
        with store.writing(wait=600):
            if self.is_sealed(store, whole):
                return True
            shards: list[dict[str, Any]] = []
            columns = None
            for rank in range(self.world_size):
                name = Part(rank, self.world_size, 0, 0).name
                part = store / name
                if not part.exists(MANIFEST):
                    continue  # has no rows, or is missing: the sum tells
                manifest = read_manifest(part, FORMAT)
                expected = {**whole, "expected_rows": manifest["expected_rows"]}
                refuse_changes(part, manifest, expected, StoreWriter.identity)
                if not manifest["complete"]:
                    return False
                columns = manifest["columns"]
                shards += [_moved(shard, name) for shard in manifest["shards"]]
            if sum(shard["rows"] for shard in shards) != whole["expected_rows"]:
                return False
            sealed = {
                **manifest,
                "rows": whole["expected_rows"],
                "expected_rows": whole["expected_rows"],
                "columns": columns,
                "shards": shards,
            }
            store.write(MANIFEST, as_json(sealed))
            return True


def _moved(shard: dict[str, Any], folder: str) -> dict[str, Any]:
    """The record of a shard, as seen from one folder further up."""
    files = {
        kind: {**file, "file": f"{folder}/{file['file']}"}
        for kind, file in shard["files"].items()
    }
    return {**shard, "files": files}
