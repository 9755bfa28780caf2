"""A run that is being indexed."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Float

from wsae.core.artifact import contained, read_manifest
from wsae.report.rundata import RunData
from wsae.sae import SparseAutoencoder
from wsae.serve.config import IndexConfig
from wsae.serve.measures import Classes, Measure
from wsae.serve.model import ModelName


@dataclass(frozen=True)
class Member:
    """A member to be indexed."""

    id: int
    hook: str
    name: str
    slug: str


@dataclass(frozen=True)
class Job:
    """A run being indexed: what was read of it, and what is asked for."""

    run: RunData
    classes: Classes
    measures: list[Measure]
    members: list[Member]
    cfg: IndexConfig
    model: ModelName

    def density(self, member: Member) -> Float[np.ndarray, " d_sae"]:
        """Return how often each latent of a member fires."""
        found = self.run.array(member.hook, member.name, "density")
        assert found is not None, "only members with densities are indexed"
        return found

    def load(self, member: Member) -> SparseAutoencoder | None:
        """Return a member's SAE, none where the run keeps no weights of it; raises UserError for a damaged one."""
        listed = self.run.manifest.get("info", {}).get("members", {}).get(member.hook, [])
        place = contained(self.run.path, f"members/{member.hook}/{member.name}")
        return SparseAutoencoder.load(place) if member.name in listed else None

    def weights(self, member: Member) -> str:
        """Return the digest of the manifest of a member's weights."""
        return weights_digest(self.run.path / "members" / member.hook / member.name)


def weights_digest(place: Path) -> str:
    """Return the digest of the manifest of an SAE, which names its content; raises UserError when it has none."""
    return read_manifest(place, "sae", verify=False).digest()
