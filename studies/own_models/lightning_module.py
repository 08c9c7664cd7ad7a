"""Kinds of wine from chemistry: a Lightning module as it is, `pip install lightning`."""

import lightning
import torch
from sklearn.datasets import load_wine
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import TensorDataset

from momentum_tuner import Task, from_lightning


class Wine(lightning.LightningModule):
    def __init__(self, hidden: int):
        super().__init__()
        self.save_hyperparameters()
        self.net = nn.Sequential(nn.Linear(13, hidden), nn.ReLU(), nn.Linear(hidden, 3))

    def training_step(self, batch, batch_idx):
        x, y = batch
        loss = cross_entropy(self.net(x), y)
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch, batch_idx):
        x, y = batch
        logits = self.net(x)
        self.log("val_loss", cross_entropy(logits, y))
        self.log("val_acc", (logits.argmax(-1) == y).float().mean())

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def build(hidden: int = 16) -> Task:
    x, y = (torch.tensor(part) for part in load_wine(return_X_y=True))
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    x, y = x[order], y[order]
    x = ((x - x[:128].mean(0)) / x[:128].std(0)).float()
    train, valid = TensorDataset(x[:128], y[:128]), TensorDataset(x[128:], y[128:])
    return from_lightning(lambda: Wine(hidden), train, valid, metrics={"accuracy": "val_acc"})
