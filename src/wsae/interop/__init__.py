"""SAEs of other libraries, read and written: SAELens, sparsify, dictionary_learning, SAEBench and the hub.

    loaded = wsae.interop.load(path)            # any format here: loaded.sae, loaded.about, loaded.format
    wsae.interop.save(sae, path, "saelens")     # a folder that SAE.load_from_disk reads

Names are loaded when first used, so that the command line's help needs no PyTorch.
"""

import importlib
from typing import TYPE_CHECKING

from wsae.interop.config import FORMATS, FormatName
from wsae.sae.config import Provenance

if TYPE_CHECKING:
    from wsae.interop.saebench import SAEBenchSAE
    from wsae.interop.saes import Loaded, load, save

_WHERE = {
    "Loaded": "wsae.interop.saes",
    "load": "wsae.interop.saes",
    "save": "wsae.interop.saes",
    "SAEBenchSAE": "wsae.interop.saebench",
}

__all__ = ["FORMATS", "FormatName", "Loaded", "Provenance", "SAEBenchSAE", "load", "save"]


def __getattr__(name: str) -> object:
    if name in _WHERE:
        return getattr(importlib.import_module(_WHERE[name]), name)
    raise AttributeError(f"module 'wsae.interop' has no attribute {name!r}")
