"""An optimizer step as one captured function: it does what the rules do one operation after the other."""

from dataclasses import replace

import pytest
import torch
from torch.utils.data import TensorDataset

from momentum_tuner.tasks import digits_mlp
from momentum_tuner.trainer import Trainer, TrialSettings
from momentum_tuner.trainer.layout import ALONE, Layout
from momentum_tuner.trainer.stack import Stack, by_rule
from momentum_tuner.trainer.state import new_state
from momentum_tuner.trainer.update import UPDATE, Standing

SLOTS = (
    ("sgd", {}),
    ("momentum", {"momentum": 0.9, "weight_decay": 0.1}),
    ("nesterov", {"momentum": 0.8}),
    ("momentum", {"momentum": 0.7, "dampening": 0.2}),
    ("momentum_classic", {"momentum": 0.9}),
    ("momentum_classic", {"momentum": 0.5}),
    ("nesterov_lookahead", {"momentum": 0.9, "weight_decay": 0.1}),
    ("nesterov_lookahead", {"momentum": 0.6}),
    ("adam", {"beta1": 0.9, "beta2": 0.99, "eps": 1e-8}),
    ("adam", {"beta1": 0.8, "beta2": 0.9, "eps": 1e-8, "weight_decay": 0.1}),
    ("adamw", {"beta1": 0.9, "beta2": 0.99, "eps": 1e-8, "weight_decay": 0.1}),
    ("rmsprop", {"alpha": 0.9, "eps": 1e-8}),
    ("rmsprop", {"alpha": 0.9, "eps": 1e-8, "weight_decay": 0.1}),
)


def in_bfloat16(task):
    model, (train, valid) = task.model, (TensorDataset(d[:][0].bfloat16(), d[:][1]) for d in (task.train, task.valid))
    return replace(task, model=lambda: model().bfloat16(), train=train, valid=valid)


def make_stack(compiled, narrow=False):
    # Two segments: 64 x 20 weights, and the smaller ones together.
    task = digits_mlp(hidden=20)
    if narrow:
        trainer = Trainer(in_bfloat16(task), epochs=1, slots=1, mode="fused")
    else:
        trainer = Trainer(task, epochs=1, slots=1, mode="fused", precision="float64")
    objective = trainer.objective
    objective.replay.patience = 0
    if compiled:
        objective.replay.compiles = frozenset({UPDATE})
    settings = [TrialSettings(name, {"learning_rate": 0.01 * (i + 1)} | v, 64, i) for i, (name, v) in enumerate(SLOTS)]
    settings.sort(key=by_rule)
    return Stack(objective, settings, [new_state(objective, one).tensors for one in settings])


@pytest.mark.parametrize("clips", [False, True], ids=["", "clips"])
@pytest.mark.parametrize("cycles", [False, True], ids=["", "cycles"])
@pytest.mark.parametrize("narrow", [False, True], ids=["", "bfloat16"])
def test_a_captured_step_is_that_of_the_rules(narrow, clips, cycles, monkeypatch):
    captured = []
    monkeypatch.setattr(
        "momentum_tuner.trainer.replay.compile_graph", lambda graph, *_: captured.append(graph) or graph
    )
    close = 1e-6 if narrow else 1e-12
    plain, whole = make_stack(False, narrow), make_stack(True, narrow)
    assert len(plain.rows) == 2 and plain.rows[0].dtype == (torch.bfloat16 if narrow else torch.float64)
    generator = torch.Generator().manual_seed(0)
    for step in range(4):
        grads = tuple(torch.randn(s.shape, generator=generator, dtype=s.dtype) for s in plain.rows)
        rate = plain.column([0.1 / (i + step + 1) for i in range(len(SLOTS))])
        stopped = [(i + step) % 5 for i in range(len(SLOTS))]  # 0: above the limit, 1: not finite, 2: before, or not
        loss = plain.column([{0: 2.0, 1: float("nan")}.get(why, 1.0) for why in stopped])
        active = plain.column([why != 2 for why in stopped]) > 0
        columns = {
            "loss": loss,
            "standing": Standing(torch.full_like(rate, 1.5), active, torch.full_like(rate, step)),
            "max_norm": plain.column([float("inf"), 0.5] * 6 + [1e-3]) if clips else None,
            "rate": rate,
            "cycle": plain.column([1.0 - 0.1 * step] * len(SLOTS)) if cycles else None,
            "count": plain.column([step + 1.0] * len(SLOTS)),
        }
        (measures, standing), (found, after) = (stack.step(grads, **columns) for stack in (plain, whole))
        torch.testing.assert_close(found, measures, rtol=close, atol=close / 100, equal_nan=True)
        assert standing.active.tolist() == after.active.tolist() == [why > 2 for why in stopped]
        assert standing.taken.tolist() == after.taken.tolist() == [step + (why > 2) for why in stopped]
        for one, other in zip(plain.tensors(), whole.tensors(), strict=True):
            assert one.keys() == other.keys()
            for name, value in one.items():
                torch.testing.assert_close(other[name], value, rtol=close, atol=close / 100)
    moved = [t["previous_update"].abs().max() > 0 for t in whole.tensors()]
    assert moved == [why > 2 for why in stopped]
    # The single slot of AdamW is not compiled, as code for one slot serves no other width.
    assert len(captured) == 5 and len(whole.objective.replay._of(UPDATE)) == 6


@pytest.mark.usefixtures("compiled_code")
def test_a_compiled_step_is_that_of_the_rules():
    plain, whole = make_stack(False), make_stack(True)
    for stack in (plain, whole):
        stack.slices = [piece for piece in stack.slices if piece.rule.name == "sgd"]
        (piece,) = stack.slices
        piece.start, piece.stop = 0, piece.stop - piece.start
        for name in ("rows", "previous", "update"):
            setattr(stack, name, tuple(segment[: piece.stop] for segment in getattr(stack, name)))
    for step in range(3):
        grads = tuple(torch.full_like(segment, 0.1 * (step + 1)) for segment in plain.rows)
        ones = plain.column([1.0] * len(plain.rows[0]))
        arguments = (ones, Standing(2.0 * ones, ones > 0, ones), None, 0.1 * ones, None, ones * (step + 1))
        (measures, _), (found, _) = (stack.step(grads, *arguments) for stack in (plain, whole))
        torch.testing.assert_close(found, measures, rtol=1e-12, atol=1e-14)
        for one, other in zip(plain.rows, whole.rows, strict=True):
            torch.testing.assert_close(other, one, rtol=1e-12, atol=1e-14)
    (kind,) = whole.objective.replay._of(UPDATE)
    assert kind.runners == {4: kind.compiled}
    assert not whole.objective.replay.failed


def test_segments_hold_large_parameters_alone_and_small_ones_together():
    sizes = (10, ALONE, ALONE - 1, 3, 2 * ALONE, 5, 7)
    layout = Layout(tuple("abcdefg"), tuple(torch.Size([n]) for n in sizes), sizes, torch.float32)
    assert layout.segments == ((1,), (4,), (0, 2, 3, 5, 6))
    row = torch.arange(layout.parameters, dtype=torch.float32)
    rows = torch.stack([row, -row])
    segments = layout.stack([row, -row])
    assert all(segment.is_contiguous() for segment in segments)
    assert [segment.shape[1] for segment in segments] == [ALONE, 2 * ALONE, ALONE + 24]
    assert torch.equal(layout.join(segments), rows) and torch.equal(layout.join(layout.split(rows)), rows)
    views = layout.views(layout.split(row))
    assert torch.equal(torch.cat([views[name] for name in layout.names]), row)
    for only in (sizes[:1], sizes[1:2]):
        assert Layout(("a",), (torch.Size(only),), only, torch.float32).segments == ((0,),)
