"""What was really read of a source: a digest of every stored tensor, taken from the bytes as they were read.

Owns: `Ledger`, `recorded`, which gives a model directory one, and `travelling`, the files that go with a model. A file that is replaced
while a run goes on, or between a kill and the run that goes on, keeps its size and its date if it was copied so; its bytes
tell. Every read is compared with the first, so one run never mixes two models.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from arrondi.checkpoint import Checkpoint, ModelDir, digest_of, digest_pieces, file_sha256
from arrondi.checkpoint.containers.tensor_file import as_memory, read_bytes
from arrondi.errors import FileFormatError


class Ledger:
    """Digests of the tensors of one source.

    Attributes:
        files: SHA-256 of its config.json and of the files that travel with it.
        digests: stored tensor → digest of its bytes, of all that were read or checked so far.
    """

    def __init__(self, where: str, files: Mapping[str, str], digest: Callable[[str], str | None]) -> None:
        """
        Args:
            where: the source, as an error names it.
            digest: stored tensor → digest of its bytes as they are now; None if there is none of this name.
        """
        self.files = dict(files)
        self.digests: dict[str, str] = {}
        self._where, self._digest = where, digest
        self._fresh: dict[str, str] = {}

    def note(self, name: str, digest: str) -> None:
        """A tensor with this digest was read.

        Raises:
            FileFormatError: it was another when it was read before.
        """
        if self.digests.setdefault(name, digest) != digest:
            raise FileFormatError(
                f"{self._where}: the bytes of {name} changed while the run was going on. Let the model rest, and run the same command again."
            )
        self._fresh.setdefault(name, digest)

    def taken(self) -> dict[str, str]:
        """The digests of the tensors that were read since the last call, for the line of the journal."""
        fresh, self._fresh = self._fresh, {}
        return fresh

    def check(self, name: str) -> str | None:
        """The digest of a tensor as it is now; it is read once."""
        if name not in self.digests:
            found = self._digest(name)
            if found is None:
                return None
            self.digests[name] = found
        return self.digests[name]


def recorded(checkpoint: Checkpoint) -> tuple[Checkpoint, Ledger]:
    """The same checkpoint, and a ledger that notes whatever is read through it."""
    folder = checkpoint.folder

    def digest(name: str) -> str | None:
        entry = folder.entries.get(name)
        if entry is None:
            return None
        return digest_pieces(entry.nbytes, lambda offset, length: as_memory(read_bytes(entry, offset, length)))

    own = folder.home / "config.json"
    files = {**({"config.json": own} if own.exists() else {}), **travelling(folder)}  # a file of a graph may have none
    ledger = Ledger(str(folder.path), {name: file_sha256(path) for name, path in files.items()}, digest)
    values = {name: getattr(folder, name) for name in ModelDir.__dataclass_fields__}
    return replace(checkpoint, folder=_Recorded(**values, ledger=ledger)), ledger


def travelling(folder: ModelDir) -> dict[str, Path]:
    """Tokenizer, chat template, licence: name in the output → file of the model."""
    return {path.as_posix(): folder.home / path for path in folder.other_files()}


@dataclass(frozen=True)
class _Recorded(ModelDir):
    """A model directory that notes what is read."""

    ledger: Ledger = field(kw_only=True, compare=False, repr=False)

    def stored(self, name: str) -> torch.Tensor:
        tensor = super().stored(name)
        self.ledger.note(name, digest_of(as_memory(tensor)))
        return tensor
