"""Digits, shifted by a pixel at random: a DataLoader with worker processes, whose batches are dictionaries."""

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, Dataset

from momentum_tuner import Task


class Digits(Dataset):
    def __init__(self, images, labels, shift):
        self.images, self.labels, self.shift = images, labels, shift

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        image = self.images[index]
        if self.shift:
            down, right = torch.randint(-1, 2, (2,)).tolist()
            image = image.roll((down, right), dims=(0, 1))
        return {"image": image, "label": self.labels[index]}


def loss(model, batch):
    return cross_entropy(model(batch["image"]), batch["label"])


def accuracy(model, batch):
    return (model(batch["image"]).argmax(-1) == batch["label"]).float().mean()


def build(batch_size: int = 64, workers: int = 2) -> Task:
    data = load_digits()
    images, labels = torch.tensor(data.images, dtype=torch.float32) / 16, torch.tensor(data.target)
    return Task(
        model=lambda: nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10)),
        loss=loss,
        train=DataLoader(Digits(images[:1400], labels[:1400], True), batch_size, shuffle=True, num_workers=workers),
        valid=DataLoader(Digits(images[1400:], labels[1400:], False), batch_size=397),
        metrics={"accuracy": accuracy},
    )
