"""How much of a known ground truth an SAE recovers: losses, matchings, detection, activated features.

`recovery` scores an SAE; `ground_truth` and `score_codes` serve many SAEs on one world. Names that need torch are
imported on first use.
"""

import importlib
from typing import TYPE_CHECKING

from wsae.evals.recovery.glossary import RECOVERY, recovery_glossary
from wsae.evals.recovery.options import RecoveryConfig

if TYPE_CHECKING:
    from wsae.evals.recovery.score import Codes, Recovery, ground_truth, recovery, score_codes
    from wsae.evals.recovery.truth import GroundTruth

_WHERE = {
    "Codes": "wsae.evals.recovery.score",
    "GroundTruth": "wsae.evals.recovery.truth",
    "Recovery": "wsae.evals.recovery.score",
    "ground_truth": "wsae.evals.recovery.score",
    "recovery": "wsae.evals.recovery.score",
    "score_codes": "wsae.evals.recovery.score",
}

__all__ = [
    "RECOVERY",
    "Codes",
    "GroundTruth",
    "Recovery",
    "RecoveryConfig",
    "ground_truth",
    "recovery",
    "recovery_glossary",
    "score_codes",
]


def __getattr__(name: str) -> object:
    if name in _WHERE:
        return getattr(importlib.import_module(_WHERE[name]), name)
    raise AttributeError(f"module 'wsae.evals.recovery' has no attribute {name!r}")
