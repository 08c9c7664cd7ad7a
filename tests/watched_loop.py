"""A small loop of the user's own for tests of workers: it notes each epoch, and does what a file asks for.

The files are in the folder that the study names. `hold` lets every epoch from that number on wait, `kill` ends the
process there, and `fail` lets the loop raise an error.
"""

import json
import os
import signal
import threading
import time
from pathlib import Path

import torch
from torch import nn

from momentum_tuner import Loop


def build(folder: str, save_every: int = 1) -> Loop:
    place = Path(folder)

    def asked(name: str, epoch: int) -> bool:
        try:
            return epoch >= int((place / name).read_text())
        except (FileNotFoundError, ValueError):
            return False

    def train(context):
        point = nn.Parameter(torch.randn(4))
        optimizer = context.optimizer([point])
        if state := context.load():
            point.data.copy_(state["point"])
            optimizer.load_state_dict(state["optimizer"])
        yield {"valid_loss": point.square().sum(), "valid_largest": point.abs().max()}
        for epoch in range(context.epoch + 1, context.epochs + 1):
            with (place / "epochs").open("a") as file:
                rate = context.settings["learning_rate"]
                file.write(json.dumps([os.getpid(), threading.current_thread().name, rate, epoch]) + "\n")
            while asked("hold", epoch):
                time.sleep(0.01)
            if asked("kill", epoch):
                os.kill(os.getpid(), signal.SIGKILL)
            if asked("fail", epoch):
                raise RuntimeError("this setting fails")
            loss = (point + 0.1 * torch.randn(4)).square().sum()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if epoch % save_every == 0:
                context.save({"point": point, "optimizer": optimizer.state_dict()})
            yield {"valid_loss": point.square().sum(), "valid_largest": point.abs().max(), "train_loss": loss}

    return Loop(train=train, metrics=["largest"])
