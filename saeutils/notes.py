"""Notes on latents that a user keeps, in one plain file.

    {"format": "saeutils.notes", "version": 1,
     "saes": {FINGERPRINT: {"about": "…", "d_sae": 1536,
                            "latents": {"12": {"text": "…", "label": "…",
                                               "changed": "2026-01-31T12:00:00"}}}}}

JSON that any editor opens. `text` is the user's, `label` a machine's. Notes belong to
an SAE by its fingerprint: those on another SAE stay in the file, untouched. Each change
reads the file anew, and replaces it whole; the version before is kept beside it.
"""

import json
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from saeutils.storage import Folder, explained

if TYPE_CHECKING:
    import pandas as pd

FORMAT, VERSION = "saeutils.notes", 1
WAIT = 10  # seconds for another process to finish writing


class Notes(Mapping[int, str]):
    """The notes on one SAE: latent -> the user's text; latents without one are absent.

    Opening writes nothing. Raises ValueError for a file that cannot be read as notes;
    it is left as it is.

    Args:
        path: of the file; its folder is made when the first note is written.
        sae: whose notes; an SAE, a baseline, or its fingerprint.
        about: where the SAE belongs, for people who open the file.
        d_sae: needed beside a fingerprint.
    """

    def __init__(
        self, path: str | Path, sae: Any, *, about: str = "", d_sae: int | None = None
    ) -> None:
        self.path = Path(path)
        if isinstance(sae, str):
            if d_sae is None:
                raise ValueError("a fingerprint alone: say how many latents, d_sae=…")
            self.sae, self.d_sae = sae, d_sae
        else:
            from saeutils.codes import sae_fingerprint

            self.sae, self.d_sae = sae_fingerprint(sae), len(sae.W_dec)
        self.about = about
        self._read()

    def __getitem__(self, latent: int) -> str:
        return self._noted()[latent]

    def __iter__(self) -> Iterator[int]:
        return iter(self._noted())

    def __len__(self) -> int:
        return len(self._noted())

    def write(self, latent: int, text: str) -> None:
        """Note `text` on a latent, in place of what was noted; "" takes it away.

        Raises ValueError for a latent that the SAE does not have.
        """
        self._change({latent: {"text": text}})

    def suggest(self, labels: Mapping[int, str]) -> None:
        """Write machine-made labels beside the user's texts, which stay as they are."""
        self._change({latent: {"label": label} for latent, label in labels.items()})

    def table(self) -> "pd.DataFrame":
        """A row a latent with a note or a label: latent, text, label, changed."""
        import pandas as pd

        rows = [
            (latent, note.get("text", ""), note.get("label", ""), note.get("changed"))
            for latent, note in self._own(self._read()).items()
        ]
        return pd.DataFrame(rows, columns=["latent", "text", "label", "changed"])

    @property
    def others(self) -> dict[str, tuple[str, int]]:
        """Fingerprint of other SAEs in the file -> what they are, latents noted."""
        every = self._read()["saes"]
        return {
            name: (one["about"], len(one["latents"]))
            for name, one in every.items()
            if name != self.sae
        }

    def _noted(self) -> dict[int, str]:
        own = self._own(self._read())
        return {latent: note["text"] for latent, note in own.items() if "text" in note}

    def _own(self, content: dict[str, Any]) -> dict[int, dict[str, str]]:
        latents = content["saes"].get(self.sae, {}).get("latents", {})
        return {int(name): note for name, note in latents.items()}

    def _read(self) -> dict[str, Any]:
        if not self.path.exists():
            return {"format": FORMAT, "version": VERSION, "saes": {}}
        try:
            content = json.loads(self.path.read_text(encoding="utf-8"))
            if (content["format"], content["version"]) != (FORMAT, VERSION):
                raise ValueError(f"its format is {content['format']!r}")
            for one in content["saes"].values():
                _ = one["about"], [int(latent) for latent in one["latents"]]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            backup = self.path.with_name(self._backup)
            there = f"; the version before is {backup}" if backup.exists() else ""
            raise ValueError(
                f"{self.path} cannot be read as notes ({error}). It was left as it is: "
                f"mend it by hand, or move it away{there}"
            ) from error
        return content

    @property
    def _backup(self) -> str:
        return f"{self.path.name}.bak"

    def _change(self, changes: Mapping[int, dict[str, str]]) -> None:
        from filelock import FileLock

        changes = {int(latent): change for latent, change in changes.items()}
        for latent in changes:
            if not 0 <= latent < self.d_sae:
                raise ValueError(f"latent {latent} is not in 0..{self.d_sae - 1}")
        folder = Folder(self.path.parent)
        folder.path.mkdir(parents=True, exist_ok=True)
        now = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
        lock = FileLock(self.path.with_name(f".{self.path.name}.lock"), timeout=WAIT)
        with lock, explained(folder, "The notes of before are safe."):
            content = self._read()
            entry = content["saes"].setdefault(
                self.sae, {"about": self.about, "d_sae": self.d_sae, "latents": {}}
            )
            noted = self._own(content)
            for latent, change in changes.items():
                old = noted.get(latent, {})
                new = {k: v for k, v in (old | change).items() if v != ""}
                if new != old:
                    noted[latent] = new | {"changed": now}
                if not new.keys() - {"changed"}:
                    noted.pop(latent, None)
            entry["latents"] = {str(i): noted[i] for i in sorted(noted)}
            text = json.dumps(content, indent=1, ensure_ascii=False) + "\n"
            if self.path.exists():
                folder.write(self._backup, self.path.read_bytes())
            folder.write(self.path.name, text.encode())
