"""A trial's curve is its own: alone, in any batch, fused or not, after changing slots, and in a plain torch loop."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.utils.data import TensorDataset

from momentum_tuner.tasks import digits_cnn, digits_mlp, digits_rnn
from momentum_tuner.trainer import ScheduleSettings, Trainer, TrialSettings, compiling, replay, slots
from momentum_tuner.trainer.randomness import mix_seed

torch.set_num_threads(1)

TOLERANCE = {"float32": 1e-4, "float64": 1e-9}
EXAMPLES, BATCH, STEPS = 400, 32, 8
WIDE = ScheduleSettings("cosine", {"final_fraction": 0.1})
MODELS = {
    "mlp": lambda: digits_mlp(hidden=16),
    "cnn with batch norm": lambda: digits_cnn(channels=4, batch_norm=True),
    "lstm": lambda: digits_rnn(cell="lstm", hidden=8),
}
ROWS = {"lstm": 4}
"""Of an image: every one makes the graph of a recurrent network longer."""

SUBJECTS = {
    "momentum": TrialSettings(
        "momentum", {"learning_rate": 0.05, "momentum": 0.9, "weight_decay": 1e-2, "clip_norm": 0.5}, BATCH, 3
    ),
    "nesterov": TrialSettings("nesterov", {"learning_rate": 0.1, "momentum": 0.8, "weight_decay": 1e-3}, BATCH, 5),
    "adam": TrialSettings(
        "adam", {"learning_rate": 0.01, "beta1": 0.9, "beta2": 0.99, "eps": 1e-6, "weight_decay": 1e-3}, BATCH, 3
    ),
}


@pytest.fixture(params=MODELS)
def task(request):
    """A task on the first digits, so that an epoch is short."""
    built, rows = MODELS[request.param](), ROWS.get(request.param)
    sizes = (built.train, EXAMPLES), (built.valid, 96)
    train, valid = (TensorDataset(d.tensors[0][:n, :rows], d.tensors[1][:n]) for d, n in sizes)
    return replace(built, train=train, valid=valid, steps_per_epoch=STEPS)


@pytest.fixture(params=TOLERANCE)
def precision(request):
    return request.param


@pytest.fixture(params=["fused", "sequential", "replayed"])
def mode(request, monkeypatch):
    """How slots train; `replayed` is fused, from the graph of a step."""
    if request.param == "replayed":
        monkeypatch.setattr(replay, "PATIENCE", 0)
        return "fused"
    return request.param


@pytest.fixture
def step_tables(monkeypatch):
    """The measures of every step of every epoch trained, in the order of the records."""
    found = []
    summarize = slots.summarize_steps

    def spy(table, taken):
        names = ("loss", "grad_norm", "update_norm", "layer_grad_ratio")
        found.extend({name: getattr(table, name)[:, slot] for name in names} for slot in range(len(taken)))
        return summarize(table, taken)

    monkeypatch.setattr(slots, "summarize_steps", spy)
    return found


def neighbours(count):
    """Other trials: other optimizers, settings and seeds, one of which diverges."""
    names = ["sgd", "rmsprop", "adamw", "nesterov_lookahead", "momentum_classic", "momentum", "nesterov", "adam"]
    others = []
    for i in range(count):
        rate = 1e4 if i == 2 else 10.0 ** -(1 + i % 3)
        hyper = {"learning_rate": rate, "momentum": 0.5, "beta1": 0.8, "beta2": 0.9, "alpha": 0.9, "eps": 1e-8}
        others.append(TrialSettings(names[i % len(names)], hyper, BATCH, seed=i % 4))
    return others


def train_first_epoch(trainer, settings, step_tables):
    """By subject, its record after one epoch and the measures of each of its steps."""
    for key, one in settings.items():
        trainer.admit(key, one)
    step_tables.clear()
    trained = list(zip(list(trainer.train_epoch()), step_tables, strict=True))
    for key in settings:
        trainer.release(key)
    return {key: (record, steps) for (key, record), steps in trained if key in SUBJECTS}


def among(count):
    """The subjects in the middle of others, `count` in all."""
    others = neighbours(count - len(SUBJECTS))
    half = len(others) // 2
    return dict(enumerate(others[:half])) | SUBJECTS | dict(enumerate(others[half:], start=half))


def worst(found, expected):
    """Largest relative difference."""
    found, expected = np.asarray(found, dtype=float), np.asarray(expected, dtype=float)
    return float(np.max(np.abs(found - expected) / np.abs(expected)))


def assert_same_record(found, expected, tolerance):
    same = ["epoch", "step", "oscillation", "spikes", "diverged_at_step"]
    assert [getattr(found, name) for name in same] == [getattr(expected, name) for name in same]
    for name in ("train_loss", "valid_loss", "grad_norm", "grad_norm_max", "update_norm", "layer_grad_ratio"):
        assert getattr(found, name) == pytest.approx(getattr(expected, name), rel=tolerance), name
    assert found.metrics == pytest.approx(expected.metrics, abs=1e-6)


def test_the_curve_is_the_same_alone_in_a_batch_of_7_and_in_a_batch_of_64(task, precision, mode, step_tables):
    options = {"epochs": 4, "schedule": WIDE, "mode": mode, "precision": precision}
    alone, trainer = {}, Trainer(task, slots=1, **options)
    for key, settings in SUBJECTS.items():
        alone |= train_first_epoch(trainer, {key: settings}, step_tables)
    for count in (7, 64):
        batch = train_first_epoch(Trainer(task, slots=count, **options), among(count), step_tables)
        assert set(batch) == set(SUBJECTS)
        for key, (record, steps) in batch.items():
            assert len(steps["loss"]) == STEPS
            difference = worst(steps["loss"], alone[key][1]["loss"])
            print(f"{key} in {count}: {difference:.1e}")
            assert difference < TOLERANCE[precision]
            for name in ("grad_norm", "update_norm"):
                assert worst(steps[name], alone[key][1][name]) < 10 * TOLERANCE[precision]
            assert_same_record(record, alone[key][0], 10 * TOLERANCE[precision])


def export_all(trainer):
    return {key: trainer.export(key) for key in SUBJECTS}


def test_the_curve_and_the_state_are_the_same_after_leaving_and_re_entering_slots(task, precision, mode):
    """Epoch 1 here, epoch 2 in another trainer of the other kind among others, epoch 3 back in the first."""
    tolerance = TOLERANCE[precision]
    options = {"epochs": 4, "schedule": WIDE, "precision": precision}
    task = replace(task, steps_per_epoch=4)
    epochs = 3

    control = Trainer(task, slots=3, mode=mode, **options)
    for key, settings in SUBJECTS.items():
        control.admit(key, settings)
    expected = [dict(control.train_epoch()) for _ in range(epochs)]

    here = Trainer(task, slots=4, mode=mode, **options)
    there = Trainer(task, slots=9, mode="sequential" if mode == "fused" else "fused", **options)
    for i, other in enumerate(neighbours(6)):
        there.admit(f"other {i}", other)
    list(there.train_epoch())
    for key, settings in SUBJECTS.items():
        here.admit(key, settings)
    found = []
    for trainer in (here, there, here):
        if found:
            states = export_all(there if trainer is here else here)
            for key, settings in SUBJECTS.items():
                (there if trainer is here else here).release(key)
                assert trainer.admit(key, settings, states[key]) is None
        found.append(dict(trainer.train_epoch()))

    for epoch in range(epochs):
        for key in SUBJECTS:
            assert_same_record(found[epoch][key], expected[epoch][key], 10 * tolerance)
    for key, state in export_all(here).items():
        whole = control.export(key)
        assert set(state.tensors) == set(whole.tensors)
        assert (state.epoch, state.step) == (whole.epoch, whole.step) == (3, 12)
        assert state.initial_loss == pytest.approx(whole.initial_loss, rel=tolerance)
        for name, value in whole.tensors.items():
            scale = value.double().norm().item()
            assert (state.tensors[name] - value).double().norm().item() <= 100 * tolerance * scale, name


def test_a_slot_carries_the_buffers_of_batch_norm_with_it():
    task = replace(digits_cnn(channels=2, batch_norm=True), steps_per_epoch=3)
    first = Trainer(task, epochs=2, slots=2)
    for key, seed in (("a", 0), ("b", 1)):
        first.admit(key, TrialSettings("sgd", {"learning_rate": 0.1}, BATCH, seed))
    list(first.train_epoch())
    states = {key: first.export(key) for key in "ab"}
    names = {n for n in states["a"].tensors if n.startswith("buffer/")}
    assert {n.split(".")[-1] for n in names} == {"running_mean", "running_var", "num_batches_tracked"}
    assert len(names) == 6
    for state in states.values():
        assert all(state.tensors[n].item() == 3 for n in names if n.endswith("num_batches_tracked"))
    mean = next(n for n in names if n.endswith("running_mean"))
    assert not torch.equal(states["a"].tensors[mean], states["b"].tensors[mean])
    second = Trainer(task, epochs=2, slots=2)
    for key, seed in (("b", 1), ("a", 0)):
        second.admit(key, TrialSettings("sgd", {"learning_rate": 0.1}, BATCH, seed), states[key])
    for key in "ab":
        again = second.export(key)
        assert all(torch.equal(again.tensors[n], value) for n, value in states[key].tensors.items())


# --- against a loop that shares no code with the trainer but the seed of an epoch's order


def plain_loop(task, settings, dtype, epochs):
    """Per epoch: mean training loss, validation loss, mean and maximum gradient norm, mean update norm, oscillation."""
    hyper = dict(settings.hyperparameters)
    torch.manual_seed(settings.seed)
    model = task.model().to(dtype)
    parameters = list(model.parameters())
    rate, decay = hyper["learning_rate"], hyper["weight_decay"]
    if settings.optimizer == "adam":
        betas = (hyper["beta1"], hyper["beta2"])
        optimizer = torch.optim.Adam(parameters, lr=rate, betas=betas, eps=hyper["eps"], weight_decay=decay)
    else:
        nesterov = settings.optimizer == "nesterov"
        optimizer = torch.optim.SGD(
            parameters, lr=rate, momentum=hyper["momentum"], weight_decay=decay, nesterov=nesterov
        )
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=4 * STEPS, eta_min=0.1 * rate)
    images, labels = (t.to(dtype) if t.is_floating_point() else t for t in task.train.tensors)
    valid = [t.to(dtype) if t.is_floating_point() else t for t in task.valid.tensors]
    curve, last_update = [], None
    for epoch in range(1, epochs + 1):
        generator = torch.Generator().manual_seed(mix_seed(settings.seed, epoch))
        order = torch.randperm(EXAMPLES, generator=generator)
        losses, norms, updates, turns = [], [], [], 0
        model.train()
        for step in range(STEPS):
            rows = order[step * BATCH : (step + 1) * BATCH]
            loss = task.loss(model, (images[rows], labels[rows]))
            optimizer.zero_grad()
            loss.backward()
            norm = torch.nn.utils.clip_grad_norm_(parameters, hyper.get("clip_norm", math.inf))
            before = torch.cat([p.detach().flatten() for p in parameters])
            optimizer.step()
            schedule.step()
            update = torch.cat([p.detach().flatten() for p in parameters]) - before
            turns += last_update is not None and bool(update @ last_update < 0)
            last_update = update
            losses.append(loss.item())
            norms.append(norm.item())
            updates.append(update.norm().item())
        model.eval()
        with torch.no_grad():
            valid_loss = task.loss(model, valid).item()
        means = np.mean(losses), valid_loss, np.mean(norms), np.max(norms), np.mean(updates), turns / STEPS
        curve.append([float(v) for v in means])
    return curve


@pytest.mark.parametrize("precision", ["float64"])
@pytest.mark.parametrize("task", ["mlp"], indirect=True)
@pytest.mark.usefixtures("compiled_code")
def test_the_curve_of_compiled_steps_is_that_of_a_plain_torch_loop(task, precision, monkeypatch):
    used = []

    def compile_graph(*arguments):
        compiled = compiling.compile_graph(*arguments)
        return lambda *tensors: used.append(len(tensors[0])) or compiled(*tensors)

    monkeypatch.setattr(replay, "compile_graph", compile_graph)
    check_plain_loop(task, precision, mode="fused", compiles="on")
    assert used.count(3) >= 2 * STEPS - 1, "all steps of both epochs, but for the one that was captured"


def test_the_curve_is_that_of_a_plain_torch_loop(task, precision, mode):
    check_plain_loop(task, precision, mode=mode)


def check_plain_loop(task, precision, **options):
    trainer = Trainer(task, epochs=4, slots=3, schedule=WIDE, precision=precision, **options)
    for key, settings in SUBJECTS.items():
        trainer.admit(key, settings)
    found = [dict(trainer.train_epoch()) for _ in range(2)]
    for key, settings in SUBJECTS.items():
        expected = plain_loop(task, settings, getattr(torch, precision), 2)
        for epoch, values in enumerate(expected):
            r = found[epoch][key]
            ours = [r.train_loss, r.valid_loss, r.grad_norm, r.grad_norm_max, r.update_norm]
            # float32: the loop's update is a difference of parameters, with their rounding.
            assert ours == pytest.approx(values[:5], rel=10 * TOLERANCE[precision])
            assert worst(ours[:2], values[:2]) < TOLERANCE[precision]
            assert r.oscillation == values[5]
