"""A small task for tests of workers: it writes down every training step, and does at a step what a file asks for.

The parameter `mark` has the gradient 1, so that plain SGD moves it by the learning rate at each step: from its value a
test reads how far a trial is. The files are in the folder that the study names; each holds a number.
"""

import json
import os
import signal
import threading
import time
from pathlib import Path

import torch
from torch import nn
from torch.nn.functional import mse_loss
from torch.utils.data import TensorDataset

from momentum_tuner import Task


class Steps:
    """What happens at a training step, which sees the marks of all slots that train together."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def asked(self, name: str) -> float | None:
        try:
            return float((self.folder / name).read_text())
        except (FileNotFoundError, ValueError):  # it comes or goes just now
            return None

    def take(self, marks: list[float]) -> None:
        with (self.folder / "steps").open("a") as file:
            file.write(json.dumps([os.getpid(), threading.current_thread().name, marks]) + "\n")
        time.sleep(self.asked("seconds-per-step") or 0.0)
        who = ("", f"-{os.getpid()}", f"-{threading.current_thread().name}")
        while any(self.reached(marks, f"hold-beyond{one}") for one in who):
            time.sleep(0.01)
        if self.reached(marks, "kill-beyond"):
            os.kill(os.getpid(), signal.SIGKILL)
        if self.reached(marks, "fail-beyond"):
            raise RuntimeError("this setting fails")
        if len(marks) > (self.asked("memory-for") or len(marks)) or self.reached(marks, "no-memory-beyond"):
            raise torch.OutOfMemoryError("a test's memory is full")

    def reached(self, marks: list[float], name: str) -> bool:
        limit = self.asked(name)
        return limit is not None and any(abs(mark) > limit for mark in marks)


class Look(torch.autograd.Function):
    """Returns the mark as it is; fused slots come to `vmap` all at once."""

    @staticmethod
    def forward(mark, steps):
        steps.take(mark.tolist())
        return mark.clone()

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, gradient):
        return gradient, None

    @staticmethod
    def vmap(info, in_dims, mark, steps):
        marks = mark.movedim(in_dims[0], 0)
        steps.take(marks[:, 0].tolist())
        return marks.clone(), 0


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 1))
        self.mark = nn.Parameter(torch.zeros(1))

    def forward(self, x):
        return self.layers(x)


def build(folder: str, steps: int = 10) -> Task:
    watched = Steps(Path(folder))
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(8 * steps + 64, 6, generator=generator)
    y = torch.sin(x.sum(dim=1, keepdim=True))

    def loss(model, batch):
        found = mse_loss(model(batch[0]), batch[1])
        if not model.training:
            return found
        return found + (Look.apply(model.mark, watched) - model.mark.detach()).sum()

    return Task(
        model=Net,
        loss=loss,
        train=TensorDataset(x[64:], y[64:]),
        valid=TensorDataset(x[:64], y[:64]),
        steps_per_epoch=steps,
    )
