"""Recurrent language models."""

from __future__ import annotations

from torch import Tensor, nn


class CharLSTM(nn.Module):
    """Embedding, LSTM, linear: ids (B, T) to logits (B, T, ``vocabulary``); the state starts at zero in every window.

    The embedding is as wide as the ``hidden`` state; ``layers`` LSTM layers are stacked.
    """

    def __init__(self, vocabulary: int = 65, hidden: int = 256, layers: int = 1) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, hidden)
        self.lstm = nn.LSTM(hidden, hidden, layers, batch_first=True)
        self.linear = nn.Linear(hidden, vocabulary)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.lstm(self.embedding(x))[0])
