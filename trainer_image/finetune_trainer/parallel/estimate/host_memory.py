"""What the ranks of a node need of the host's memory, by phase."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class HostMemory:
    """Holds the bytes of the host's memory that the `ranks` ranks of the first node need together
    while the model is loaded, while it is trained and checkpoints are copied, and while the result
    is saved."""

    ranks: int
    loading: int
    training: int
    saving: int

    def __str__(self) -> str:
        return f"{gib(self.loading)} to load, {gib(self.training)} to train, {gib(self.saving)} to save"

    @property
    def peak(self) -> int:
        """The bytes that suffice for the whole run."""
        return max(self.loading, self.training, self.saving)

    @property
    def per_rank(self) -> int:
        """The share of one rank."""
        return self.peak // self.ranks

    @property
    def purpose(self) -> str:
        """What needs the most, in words."""
        if self.peak == self.loading:
            return "to load the model"
        return "to train and to copy checkpoints" if self.peak == self.training else "to save the result"


def gib(size: float) -> str:
    """Formats a number of bytes in GiB."""
    return f"{size / 2**30:.2f} GiB"
