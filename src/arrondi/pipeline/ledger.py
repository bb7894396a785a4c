"""What was really read of a source: a digest of every stored tensor, taken from the bytes as they were read.

Owns: `Ledger`. A file that is replaced while a run goes on, or between a kill and the run that goes on, keeps its size and its date
if it was copied so; its bytes tell. Every read is compared with the first, so one run never mixes two models.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch

from arrondi.checkpoint import Checkpoint, ModelDir, digest_of, digest_pieces
from arrondi.checkpoint.containers.tensor_file import as_memory, read_bytes
from arrondi.errors import FileFormatError


class Ledger:
    """Digests of the tensors of one model directory.

    Attributes:
        digests: stored tensor → digest of its bytes, of all that were read or checked so far.
    """

    def __init__(self, folder: ModelDir) -> None:
        self.folder = folder
        self.digests: dict[str, str] = {}
        self._fresh: dict[str, str] = {}

    def recorded(self, checkpoint: Checkpoint) -> Checkpoint:
        """The same checkpoint; every tensor that is read through it is noted here."""
        values = {name: getattr(checkpoint.folder, name) for name in ModelDir.__dataclass_fields__}
        return replace(checkpoint, folder=_Recorded(**values, ledger=self))

    def note(self, name: str, digest: str) -> None:
        """A tensor with this digest was read.

        Raises:
            FileFormatError: it was another when it was read before.
        """
        if self.digests.setdefault(name, digest) != digest:
            raise FileFormatError(
                f"{self.folder.path}: the bytes of {name} changed while the run was going on. Let the model rest, and run the same command again."
            )
        self._fresh.setdefault(name, digest)

    def taken(self) -> dict[str, str]:
        """The digests of the tensors that were read since the last call, for the line of the journal."""
        fresh, self._fresh = self._fresh, {}
        return fresh

    def check(self, name: str) -> str | None:
        """The digest of a tensor as it is now, or None if there is none of this name; it is read once."""
        entry = self.folder.entries.get(name)
        if entry is None:
            return None
        if name not in self.digests:
            self.digests[name] = digest_pieces(entry.nbytes, lambda o, n: as_memory(read_bytes(entry, o, n)))
        return self.digests[name]


@dataclass(frozen=True)
class _Recorded(ModelDir):
    """A model directory that notes what is read."""

    ledger: Ledger = field(kw_only=True, compare=False, repr=False)

    def read(self, name: str) -> torch.Tensor:
        tensor = super().read(name)
        self.ledger.note(name, digest_of(as_memory(tensor)))
        return tensor
