"""A model whose own parameters are bfloat16 trains as it does in torch.optim: its settings are not rounded to that."""

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import TensorDataset

from momentum_tuner import Task
from momentum_tuner.tasks.loop import torch_optimizer
from momentum_tuner.trainer import Trainer, TrialSettings
from momentum_tuner.trainer.data import MemorySource
from momentum_tuner.trainer.randomness import RandomStream

torch.set_num_threads(1)

EXAMPLES, BATCH = 320, 32
ULP = 2.0**-8
ADAM = {"learning_rate": 0.01, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8}

TRIALS = {
    "momentum": ("momentum", {"learning_rate": 0.05, "momentum": 0.9, "weight_decay": 1e-2}),
    "momentum that rounds to 1": ("momentum", {"learning_rate": 0.003, "momentum": 0.9985}),
    "nesterov": ("nesterov", {"learning_rate": 0.05, "momentum": 0.9, "clip_norm": 0.1}),
    "adam": ("adam", ADAM),
    "adam with a penalty": ("adam", ADAM | {"weight_decay": 1e-2}),
    "adamw": ("adamw", ADAM | {"weight_decay": 0.1}),
    "rmsprop": ("rmsprop", {"learning_rate": 0.003, "alpha": 0.99, "eps": 1e-8, "weight_decay": 1e-2}),
}


def data():
    x = torch.randn(EXAMPLES, 5, generator=torch.Generator().manual_seed(0)).bfloat16()
    return x, (x[:, 0] + x[:, 1].square() > 1).long()


def network():
    return nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 2)).bfloat16()


def loss_of(model, batch):
    return cross_entropy(model(batch[0]).float(), batch[1])


TASK = Task(model=network, loss=loss_of, train=TensorDataset(*data()), valid=TensorDataset(*data()))


def settings(name):
    optimizer, hyper = TRIALS[name]
    return TrialSettings(optimizer, hyper, BATCH, 3)


def plain(name, epochs):
    """The parameters after each epoch, and the validation losses, by torch.optim."""
    optimizer, hyper = TRIALS[name]
    with RandomStream(3):
        model = network()
    opt = torch_optimizer(optimizer, hyper, model.parameters())
    x, y = data()
    order = MemorySource([x, y], BATCH)
    rows, losses = [], []
    for epoch in range(1, epochs + 1):
        for which in order.order((3, epoch)):
            opt.zero_grad()
            loss_of(model, (x[which], y[which])).backward()
            if "clip_norm" in hyper:
                nn.utils.clip_grad_norm_(model.parameters(), hyper["clip_norm"])
            opt.step()
        rows.append(torch.cat([p.detach().reshape(-1) for p in model.parameters()]).float())
        losses.append(loss_of(model, (x, y)).item())
    return rows, losses


@pytest.mark.parametrize("mode", ["fused", "sequential"])
def test_every_optimizer_agrees_with_torch_up_to_rounding(mode):
    trainer = Trainer(TASK, epochs=12, slots=len(TRIALS), mode=mode)
    for name in TRIALS:
        trainer.admit(name, settings(name))
    found, first = {name: [] for name in TRIALS}, {}
    for epoch in range(12):
        for name, record in trainer.train_epoch():
            assert record.diverged_at_step is None
            found[name].append(record.valid_loss)
            if epoch == 0:
                first[name] = trainer.export(name).tensors["parameters"]
                assert first[name].dtype == torch.bfloat16
    for name in TRIALS:
        rows, losses = plain(name, 12)
        torch.testing.assert_close(first[name].float(), rows[0], rtol=2 * ULP, atol=2 * ULP, msg=name)
        assert found[name] == pytest.approx(losses, rel=0.05), name


def test_a_trial_goes_on_from_the_middle_of_an_epoch_to_the_last_bit():
    def trained(pauses):
        trainer = Trainer(TASK, epochs=2, slots=2)
        for name in ("adam", "nesterov"):
            trainer.admit(name, settings(name))
        left = iter(pauses)
        while sum(1 for _ in trainer.train_epoch(lambda: next(left, False))) == 0:
            states = {name: trainer.export(name) for name in ("adam", "nesterov")}
            assert 0 < states["adam"].epoch_steps < 10
            trainer = Trainer(TASK, epochs=2, slots=2)
            for name, state in states.items():
                trainer.admit(name, settings(name), state)
        records = [record for _, record in trainer.train_epoch()]
        return [(r.valid_loss, r.train_loss, r.grad_norm, r.oscillation) for r in records]

    assert trained([False, False, False, True]) == trained([])
