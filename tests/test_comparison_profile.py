"""The performance profile, and what the command `compare` prints."""

import io
import json
import math

import pytest
from click.testing import CliRunner
from rich.console import Console

from momentum_tuner.cli import cli
from momentum_tuner.cli.comparison_tables import print_comparison, print_comparisons
from momentum_tuner.comparison import Comparison, Contestant, compare_study, performance_profile

from .recorded import Recorded

SEEDS = range(10)


def contestant(optimizer, steps, miss_rate=0.0):
    measures = dict.fromkeys(Contestant.__dataclass_fields__)
    return Contestant(**{**measures, "optimizer": optimizer, "steps_to_target": steps, "miss_rate": miss_rate})


def comparison(study, *optimizers):
    return Comparison(study, "done", 0.5, "valid_loss", False, "momentum_0.9", {}, optimizers, (), ())


def shares(profile):
    return {
        line.optimizer: dict(zip((round(tau, 2) for tau in profile.taus), line.shares, strict=True))
        for line in profile.lines
    }


def test_the_profile_is_the_share_of_studies_within_a_factor_of_the_fastest():
    profile = performance_profile(
        [
            comparison("a", contestant("sgd", 300.0), contestant("momentum", 100.0), contestant("nesterov", 150.0)),
            comparison("b", contestant("sgd", 100.0), contestant("momentum", 200.0), contestant("nesterov", 500.0)),
            comparison("c", contestant("sgd", 100.0), contestant("momentum", 100.0), contestant("nesterov", 99.0, 0.5)),
        ]
    )
    assert profile.studies == ("a", "b", "c")
    assert (profile.taus[0], profile.taus[-1]) == (1.0, 4.0)
    found = shares(profile)
    assert [found["sgd"][tau] for tau in (1.0, 2.95, 3.0, 4.0)] == pytest.approx([2 / 3, 2 / 3, 1.0, 1.0])
    assert [found["momentum"][tau] for tau in (1.0, 1.95, 2.0, 4.0)] == pytest.approx([2 / 3, 2 / 3, 1.0, 1.0])
    assert [found["nesterov"][tau] for tau in (1.0, 1.45, 1.5, 4.0)] == pytest.approx([0.0, 0.0, 1 / 3, 1 / 3])
    factors = {line.optimizer: line.factors for line in profile.lines}
    assert factors["nesterov"] == {"a": 1.5, "b": 5.0, "c": math.inf}, "a miss is infinite, and the fastest of nobody"
    scores = {line.optimizer: line.score for line in profile.lines}
    assert scores == pytest.approx({"momentum": (3 + 2 + 3) / 9, "sgd": (1 + 3 + 3) / 9, "nesterov": 2.5 / 9})
    assert [line.optimizer for line in profile.lines] == ["momentum", "sgd", "nesterov"]
    assert json.loads(json.dumps(profile.flat(), allow_nan=False))["lines"][2]["factors"]["c"] == "inf"


def test_a_study_counts_only_for_those_that_are_in_it_and_unsolved_for_all_of_them():
    profile = performance_profile(
        [
            comparison("a", contestant("sgd", 300.0, 0.7), contestant("momentum", 400.0, 1.0)),
            comparison("b", contestant("sgd", 100.0), contestant("adam", None)),
        ]
    )
    found = shares(profile)
    assert (found["sgd"][1.0], found["sgd"][4.0], found["momentum"][4.0]) == (0.5, 0.5, 0.0)
    assert {line.optimizer: line.studies for line in profile.lines} == {"sgd": 2, "momentum": 1}
    assert performance_profile([comparison("a")]).lines == ()


# What people see


LONG = ("nesterov_lookahead", "momentum_classic", "momentum_0.9")
MEASURES = {
    "oscillation": 0.1234,
    "layer_grad_ratio": 123.4,
    "mean_valid_loss": 0.6,
    "sharpness": 1234.5,
    "stability_margin": 0.987,
}


@pytest.fixture
def study(sqlite_database, make_spec):
    """Three contestants with long names: one twice as fast as the others, which are alike."""
    found = Recorded(
        sqlite_database,
        make_spec(optimizers=list(LONG), budget={"trials": 2, "epochs": 20}, confirm={"seeds": 10}, target=0.5),
    )
    for number, optimizer in enumerate(LONG):
        momentum = None if optimizer == "momentum_0.9" else 0.9235
        settings = found.search(optimizer, 0.123456, 0.0123456, momentum)
        found.search(optimizer, 0.2, 0.2345, momentum, initial_valid_loss=2.0)
        speeds = {s: (200.0 if number == 0 else 400.0) * (1 + 0.02 * ((s * 7 + 3 * number) % 10)) for s in SEEDS}
        found.reach(optimizer, settings, speeds, **MEASURES)
    return found


def printed(function, *arguments, width=80):
    out = io.StringIO()
    function(Console(file=out, width=width, highlight=False), *arguments)
    return out.getvalue()


def test_the_whole_comparison_is_readable_at_80_columns(study):
    found = compare_study(study.database, study.record)
    text = printed(print_comparison, found)
    assert max(map(len, text.splitlines())) <= 80
    assert "…" not in text
    words = " ".join(text.split())
    for c in found.optimizers:
        assert c.optimizer in words
        assert f"{c.steps_to_target:.4g}" in words
    for number in ("0.01235", "0.92", "0.123", "123", "1.23e+03", "0.987", "target: valid_loss of 0.5 or less"):
        assert number in words
    assert "equal budgets: 2 trials, 20 epochs, 10 seeds each" in words
    for pair in found.pairs:
        assert f"{pair.speed_ratio:.3g}" in words
        assert f"{pair.low:.3g} to {pair.high:.3g}" in words
    verdicts = [pair.verdict for pair in found.pairs]
    assert "nesterov_lookahead is 2.00x faster than momentum_classic (10 seeds)" in verdicts
    assert sum(v.startswith("no difference shown with 10 seeds") for v in verdicts) == 1


@pytest.mark.parametrize(
    ("batch_size", "unit", "order"), [(64, "steps", ["sgd", "momentum_0.9"]), (16, "epochs", ["momentum_0.9", "sgd"])]
)
def test_the_unit_of_speed_is_named_wherever_speeds_are_shown(sqlite_database, make_spec, batch_size, unit, order):
    made = Recorded(sqlite_database, make_spec(optimizers=["sgd", "momentum_0.9"], target=0.5, confirm={"seeds": 10}))
    made.reach("sgd", made.search("sgd", 0.3), {s: 100.0 + s % 2 / 4 for s in SEEDS})
    large = made.search("momentum_0.9", 0.3, batch_size=batch_size)
    made.reach("momentum_0.9", large, {s: 240.0 + s for s in SEEDS})
    text = printed(print_comparison, compare_study(made.database, made.record))
    assert f"{unit} to target, the first over the second" in text
    rows = {line.split()[0]: line.split() for line in text.splitlines()[:7] if line.split()}
    assert rows["learning"] == ["learning", unit, "to", "best"]
    assert {o: rows[o][3] for o in rows if o in order} == {
        "sgd": "100.1" if unit == "steps" else "1.001",
        "momentum_0.9": "244.5" if unit == "steps" else "0.6112",
    }
    assert [o for o in rows if o in order] == order
    assert ("so speed is compared in epochs" in " ".join(text.split())) == (unit == "epochs")


def test_compare_prints_the_verdicts_and_the_notes(study):
    found = compare_study(study.database, study.record)
    result = CliRunner().invoke(cli, ["compare", "digits-mlp", "--storage", study.database.text])
    assert result.exit_code == 0, result.output
    words = " ".join(result.output.split())
    assert all(word in words for word in ("learning-rate sensitivity", "oscil-", "equal budgets", "divergence rate"))
    for pair in found.pairs:
        assert pair.verdict.split(",")[0].split()[-1] in words
    for note in found.notes:
        assert note in words


def test_compare_of_one_study_as_json_is_the_comparison(study):
    result = CliRunner().invoke(cli, ["compare", "digits-mlp", "--json", "--storage", study.database.text])
    found = json.loads(result.output)
    assert found == json.loads(json.dumps(compare_study(study.database, study.record).flat(), allow_nan=False))
    assert set(found) >= {"study", "target", "budget", "optimizers", "pairs"}
    assert set(found["pairs"][0]) >= {"a", "b", "speed_ratio", "low", "high", "p", "verdict"}
    wanted = {"optimizer", "learning_rate", "momentum", "seeds", "steps_to_target", "miss_rate", "divergence_rate"}
    assert set(found["optimizers"][0]) >= {*wanted, "best_valid_loss"}
    assert found["optimizers"][0]["settings"]["clip_norm"] == "inf"


def test_compare_of_several_studies_is_a_profile(study, make_spec):
    other = Recorded(
        study.database, make_spec(name="other", optimizers=["sgd", "momentum_0.9"], target=0.5, confirm={"seeds": 3})
    )
    other.reach("sgd", other.search("sgd", 0.3), dict.fromkeys(SEEDS[:3], 300.0))
    other.reach("momentum_0.9", other.search("momentum_0.9", 0.3), dict.fromkeys(SEEDS[:3], 200.0))
    arguments = ["compare", "digits-mlp", "other", "digits-mlp", "--storage", study.database.text]
    found = json.loads(CliRunner().invoke(cli, [*arguments, "--json"]).output)
    assert [s["study"] for s in found["studies"]] == ["digits-mlp", "other"]
    assert found["profile"]["studies"] == ["digits-mlp", "other"]
    lines = {line["optimizer"]: line for line in found["profile"]["lines"]}
    assert lines["momentum_0.9"]["factors"] == {"digits-mlp": pytest.approx(2.0), "other": 1.0}
    assert lines["sgd"]["factors"] == {"other": pytest.approx(1.5)}
    text = CliRunner().invoke(cli, arguments).output
    assert "other: best settings, the fastest first" in text
    assert "share of studies within a factor of the fastest" in text
    row = next(line.split() for line in text.splitlines()[::-1] if line.split()[:1] == ["momentum_0.9"])
    assert row == ["momentum_0.9", "2", "50%", "50%", "50%", "100%", "100%", "100%", "0.83"]
    comparisons = [compare_study(s.database, s.record) for s in (study, other)]
    narrow = printed(print_comparisons, comparisons, performance_profile(comparisons))
    assert max(map(len, narrow.splitlines())) <= 80
    assert "…" not in narrow


@pytest.mark.parametrize("filled", [False, True], ids=["no trial yet", "before the confirmation"])
def test_compare_works_before_there_is_anything_to_compare(sqlite_database, make_spec, filled):
    begun = Recorded(sqlite_database, make_spec(), "search")
    if filled:
        begun.search("sgd", 0.3)
    result = CliRunner().invoke(cli, ["compare", "digits-mlp", "--storage", sqlite_database.text])
    assert result.exit_code == 0, result.output
    assert "note: the search is not over" in result.output
    assert "verdict" in result.output or not filled
    assert ("best settings" in result.output) == filled


def test_compare_needs_a_name():
    result = CliRunner().invoke(cli, ["compare"])
    assert result.exit_code == 2
    assert "Missing argument 'NAME...'" in result.output
