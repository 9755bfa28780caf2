"""Streaming statistics: moments and counts exact under any split, a covariance in float64, tables by class."""

from wsae.stats.chance import Chance, chance_levels
from wsae.stats.classes import ClassTable, Hits
from wsae.stats.consistency import ConsistencyCounts
from wsae.stats.covariance import Covariance
from wsae.stats.moments import Moments, check_finite

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
