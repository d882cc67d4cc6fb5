"""Rows of training: documents cut into pieces of one length, in an order that a seed gives again."""

from __future__ import annotations

import random
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.utils.data import Dataset

from remoe_adapt.errors import DataError
from remoe_adapt.objective import IGNORED_LABEL


class PackedRows(Dataset[dict[str, Tensor]]):
    """Rows of `length` tokens cut from documents in a seeded random order, each document ended by `eos_id`.

    A row has `input_ids`, `labels` (-100 at the first token of each document and of the row) and `document_ids`,
    all int64 [length]. A document longer than a row goes on in the next one, as a document of its own there.
    """

    def __init__(self, documents: Sequence[Sequence[int]], length: int, eos_id: int | None, seed: int = 0) -> None:
        """Raises DataError when the documents do not fill one row."""
        order = list(range(len(documents)))
        # Files in a row would teach the routers one kind of text after the other.
        random.Random(seed).shuffle(order)
        ids: list[int] = []
        numbers: list[int] = []
        for number in order:
            document = list(documents[number]) + ([] if eos_id is None else [eos_id])
            ids += document
            numbers += [number] * len(document)
        self.rows = len(ids) // length
        if self.rows == 0:
            raise DataError(f"{len(ids)} tokens do not fill one row of {length}: give more text or a smaller --length")
        # The rest would be a shorter row, and a batch needs rows of one length.
        used = self.rows * length
        self._ids_RT = torch.tensor(ids[:used]).view(self.rows, length)
        self._documents_RT = torch.tensor(numbers[:used]).view(self.rows, length)
        # Neighbouring rows are parts of one long document: shuffle them apart.
        self._order = torch.randperm(self.rows, generator=torch.Generator().manual_seed(seed)).tolist()

    def __len__(self) -> int:
        return self.rows

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        row = self._order[index]
        ids_T, documents_T = self._ids_RT[row], self._documents_RT[row]
        labels_T = ids_T.clone()
        # Nothing before it in this row predicts it.
        labels_T[0] = IGNORED_LABEL
        labels_T[1:][documents_T[1:] != documents_T[:-1]] = IGNORED_LABEL
        return {"input_ids": ids_T, "labels": labels_T, "document_ids": documents_T}
