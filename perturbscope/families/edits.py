"""Edits of tokens: a gene is taken out of cells, hidden, or given another rank, as a perturbation in silico does."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from perturbscope.errors import InvalidParameterError

EditKind = Literal["delete", "mask", "move"]
EDIT_KINDS: tuple[EditKind, ...] = ("delete", "mask", "move")


@dataclass(frozen=True, kw_only=True)
class TokenEdit:
    """A change of one gene in the tokens of cells. A cell without the gene stays as it is.

    Attributes
    ----------
    kind
        ``delete``: the gene is taken out, and what follows moves up. ``mask``: the model sees that a gene is there, and
        not which. ``move``: the gene moves to another rank.
    gene
        Row of the gene in the vocabulary.
    position
        New rank of a moved gene among the genes of the cell, from 0; beyond the last, it becomes the last.

    Raises
    ------
    InvalidParameterError
        There is no such kind, or a number is negative.
    """

    kind: EditKind
    gene: int
    position: int = 0

    def __post_init__(self) -> None:
        if self.kind not in EDIT_KINDS:
            raise InvalidParameterError(
                f"kind is {self.kind!r}; it must be one of {', '.join(EDIT_KINDS)}.", field="kind"
            )
        for name in ("gene", "position"):
            if getattr(self, name) < 0:
                raise InvalidParameterError(f"{name} is {getattr(self, name)}; it must not be negative.", field=name)
