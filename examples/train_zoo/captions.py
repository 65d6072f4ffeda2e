"""The captions as tensors: token numbers, and a random caption for each picture of a batch."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from tokenizer import LENGTH
from transformers import CLIPTextModel, CLIPTokenizer


def tokens(tokenizer: CLIPTokenizer, captions: list[str]) -> torch.Tensor:
    """Token numbers of the captions, padded, (n, 24)."""
    encoded = tokenizer(captions, padding="max_length", max_length=LENGTH, truncation=True, return_tensors="pt")
    return encoded.input_ids


@dataclass
class CaptionTable:
    """All captions of all pictures in one list.

    Attributes:
        rows: What stands for each caption: token numbers (M, 24), or embeddings (M, 24, width).
        first: For each picture the row of its first caption, (N,).
        count: For each picture the number of its captions, (N,).
    """

    rows: torch.Tensor
    first: torch.Tensor
    count: torch.Tensor

    @classmethod
    def of(cls, captions: list[list[str]], tokenizer: CLIPTokenizer, device: torch.device) -> CaptionTable:
        """The table of token numbers."""
        count = torch.tensor([len(few) for few in captions], device=device)
        rows = tokens(tokenizer, [caption for few in captions for caption in few]).to(device)
        return cls(rows, count.cumsum(0) - count, count)

    def draw(self, index: torch.Tensor) -> torch.Tensor:
        """The row of a random caption for each of the pictures `index`, (n, ...)."""
        return self.rows[self.first[index] + (torch.rand(len(index), device=index.device) * self.count[index]).long()]

    @torch.no_grad()
    def embedded(self, encoder: CLIPTextModel, batch: int = 1024) -> CaptionTable:
        """The table with the encoder's last hidden states in place of the token numbers, in float16."""
        parts = [encoder(part).last_hidden_state.half() for part in self.rows.split(batch)]
        return CaptionTable(torch.cat(parts), self.first, self.count)
