"""wsae: train sparse autoencoders whose latents you can trust, and know how far to trust them.

Names are loaded when first used, so `import wsae` is quick and `wsae --help` needs no PyTorch.
"""

import importlib
import os
from typing import TYPE_CHECKING

from wsae.core import __version__
from wsae.core.errors import UserError

# A thread that waits for others spins for 0.1 ms and then sleeps: as long as PyTorch's OpenMP (300 times that) and
# NumPy's OpenBLAS (for ever) spin by themselves they take the core from the one waited for when other programs run.
# Both are read when the library is first imported.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")
os.environ.setdefault("OPENBLAS_THREAD_TIMEOUT", "4")

if TYPE_CHECKING:
    from wsae.api import Family, Member, evaluate, fit, fit_family, probe, recovery
    from wsae.core.progress import progress
    from wsae.run import Run
    from wsae.sae import SAE, SparseAutoencoder
    from wsae.use.attach import Add, Clamp, Scale, Set, Zero, attach
    from wsae.use.attribute import Logit, LogitDifference, Loss, attribute

_WHERE = {
    "Run": "wsae.run",
    "SAE": "wsae.sae",
    "SparseAutoencoder": "wsae.sae",
    "fit": "wsae.api",
    "fit_family": "wsae.api",
    "Family": "wsae.api",
    "Member": "wsae.api",
    "evaluate": "wsae.api",
    "probe": "wsae.api",
    "recovery": "wsae.api",
    "progress": "wsae.core.progress",
    **dict.fromkeys(("attribute", "Logit", "LogitDifference", "Loss"), "wsae.use.attribute"),
    **dict.fromkeys(("attach", "Set", "Add", "Scale", "Zero", "Clamp"), "wsae.use.attach"),
}

__all__ = [
    "Add",
    "Clamp",
    "Family",
    "Logit",
    "LogitDifference",
    "Loss",
    "Member",
    "Run",
    "SAE",
    "Scale",
    "Set",
    "SparseAutoencoder",
    "UserError",
    "Zero",
    "__version__",
    "attach",
    "attribute",
    "evaluate",
    "fit",
    "fit_family",
    "probe",
    "progress",
    "recovery",
]


def __getattr__(name: str) -> object:
    if name in _WHERE:
        return getattr(importlib.import_module(_WHERE[name]), name)
    raise AttributeError(f"module 'wsae' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
