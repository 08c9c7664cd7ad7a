"""How far diabetes has come after a year, from ten measurements of a patient: data that fits in memory."""

import torch
from sklearn.datasets import load_diabetes
from torch import nn
from torch.nn.functional import mse_loss
from torch.utils.data import TensorDataset

from momentum_tuner import Task


def build(hidden: int = 16) -> Task:
    x, y = (torch.tensor(part, dtype=torch.float32) for part in load_diabetes(return_X_y=True))
    x, y = (x - x[:352].mean(0)) / x[:352].std(0), (y.unsqueeze(1) - y[:352].mean()) / y[:352].std()
    return Task(
        model=lambda: nn.Sequential(nn.Linear(10, hidden), nn.Tanh(), nn.Linear(hidden, 1)),
        loss=lambda model, batch: mse_loss(model(batch[0]), batch[1]),
        train=TensorDataset(x[:352], y[:352]),
        valid=TensorDataset(x[352:], y[352:]),
    )
