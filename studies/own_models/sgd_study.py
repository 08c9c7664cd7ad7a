"""Malignant or benign? An ordinary training script."""

import torch
from sklearn.datasets import load_breast_cancer
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

from momentum_tuner import Task


def load_data():
    x, y = load_breast_cancer(return_X_y=True)
    x = torch.tensor((x - x[:400].mean(0)) / x[:400].std(0), dtype=torch.float32)
    y = torch.tensor(y)
    return TensorDataset(x[:400], y[:400]), TensorDataset(x[400:], y[400:])


def make_model():
    return nn.Sequential(nn.Linear(30, 32), nn.ReLU(), nn.Linear(32, 2))


def compute_loss(model, batch):
    x, y = batch
    return cross_entropy(model(x), y)


def build():
    train, valid = load_data()
    return Task(model=make_model, loss=compute_loss, train=train, valid=valid)


def main():
    torch.manual_seed(0)
    train, valid = load_data()
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    for epoch in range(20):
        for batch in DataLoader(train, batch_size=32, shuffle=True):
            optimizer.zero_grad()
            compute_loss(model, batch).backward()
            optimizer.step()
        with torch.no_grad():
            print(f"epoch {epoch + 1}: {compute_loss(model, valid.tensors):.4f}")


if __name__ == "__main__":
    main()
