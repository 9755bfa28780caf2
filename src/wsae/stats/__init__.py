"""Streaming statistics: moments and counts exact under any split, a covariance in float64, tables by class."""

from wsae.stats.classes import Chance, ClassTable, ConsistencyCounts, Hits, chance_levels
from wsae.stats.moments import Covariance, Moments, check_finite

__all__ = [
    "Chance",
    "ClassTable",
    "ConsistencyCounts",
    "Covariance",
    "Hits",
    "Moments",
    "chance_levels",
    "check_finite",
]
