"""Which of two tokens comes more often? A small transformer of Hugging Face's form: its output brings the loss."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import TensorDataset

from momentum_tuner import Task, from_huggingface


@dataclass
class Output:
    loss: Tensor | None
    logits: Tensor


class Counter(nn.Module):
    """In the place of, say, `AutoModelForSequenceClassification.from_config(config)`."""

    def __init__(self, width: int):
        super().__init__()
        self.embedding = nn.Embedding(3, width)
        self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))
        self.head = nn.Linear(width, 2)

    def forward(self, input_ids, attention_mask, labels=None):
        x = self.embedding(input_ids)
        scores = self.query(x) @ self.key(x).transpose(1, 2) / x.shape[-1] ** 0.5
        weights = scores.masked_fill(attention_mask[:, None] == 0, -1e9).softmax(-1)
        mask = attention_mask.unsqueeze(-1)
        pooled = (mask * (x + weights @ self.value(x))).sum(1) / mask.sum(1)
        logits = self.head(pooled)
        return Output(None if labels is None else cross_entropy(logits, labels), logits)


def sentences(count: int, seed: int) -> TensorDataset:
    """Sentences of 3 to 11 tokens, padded with zeros, of an odd length so that one token comes more often."""
    generator = torch.Generator().manual_seed(seed)
    lengths = 2 * torch.randint(1, 6, (count, 1), generator=generator) + 1
    mask = (torch.arange(11) < lengths).long()
    tokens = (torch.randint(1, 3, (count, 11), generator=generator)) * mask
    return TensorDataset(tokens, mask, ((tokens == 1).sum(1) > (tokens == 2).sum(1)).long())


def build(width: int = 16) -> Task:
    return from_huggingface(
        lambda: Counter(width),
        train=sentences(2048, seed=0),
        valid=sentences(512, seed=1),
        columns=["input_ids", "attention_mask", "labels"],
        metrics={"accuracy": lambda output, batch: (output.logits.argmax(-1) == batch["labels"]).float().mean()},
    )
