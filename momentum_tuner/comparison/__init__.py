"""Confirmation and verdict: which optimizer is faster, how stable, how sure."""

from momentum_tuner.comparison.landscape import (
    MeasuredEdge,
    Point,
    PredictedEdge,
    StabilityMap,
    stability_map,
)
from momentum_tuner.comparison.outcome import Comparison, Contestant, Difference, Pair
from momentum_tuner.comparison.profile import Profile, ProfileLine, performance_profile
from momentum_tuner.comparison.study import compare_study

__all__ = [
    "Comparison",
    "Contestant",
    "Difference",
    "MeasuredEdge",
    "Pair",
    "Point",
    "PredictedEdge",
    "Profile",
    "ProfileLine",
    "StabilityMap",
    "compare_study",
    "performance_profile",
    "stability_map",
]
