"""Files that mean harm or mean nothing: one line that names them, never a traceback, a hang, or memory for what is not
there. The long form is benchmarks/reliability/fuzz.py."""

import json
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from wsae.core.errors import UserError
from wsae.core.files import seal

sys.path.append(str(Path(__file__).resolve().parents[2]))
from benchmarks.reliability.mutate import mutated
from benchmarks.reliability.readers import READERS

FEW = settings(max_examples=25, suppress_health_check=[HealthCheck.too_slow], deadline=None)
ROOT = Path(__file__).resolve().parents[2]


def read(reader, data: bytes, folder: Path) -> None:
    """Have a reader read; fails for anything but a result or a UserError of one line that names the place."""
    folder = folder / "evaluation"  # so that the manifest may be one's
    folder.mkdir(exist_ok=True)
    path, words = folder / reader.name, str(folder)
    path.write_bytes(data)
    try:
        reader.call(path)
    except UserError as error:
        words = str(error)
    assert str(folder) in words
    assert "\n" not in words


@pytest.mark.parametrize("reader", READERS, ids=lambda r: r.name)
def test_sound_files_are_read(reader, tmp_path: Path) -> None:
    for data in reader.seeds():
        read(reader, data, tmp_path)


@pytest.mark.parametrize("reader", READERS, ids=lambda r: r.name)
def test_changed_files_are_read_or_refused_in_one_line(reader, tmp_path_factory) -> None:
    folder, seeds = tmp_path_factory.mktemp("fuzz"), reader.seeds()

    @FEW
    @given(data=st.sampled_from(seeds), seed=st.integers(0, 2**32))
    def change(data: bytes, seed: int) -> None:
        read(reader, mutated(data, seed), folder)

    change()


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=6),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(("h", "..", "/", "members", "models", "a\0")), inner, max_size=3
        )
    ),
    max_leaves=6,
)


KEYS = ("info", "config", "files", "inputs", "hooks", "rows", "shard_rows", "members")


@settings(max_examples=60, suppress_health_check=[HealthCheck.too_slow], deadline=None)
@given(value=JSON, key=st.sampled_from(KEYS), number=st.integers(0, 5))
def test_a_well_sealed_manifest_of_any_content_is_refused_in_one_line(
    tmp_path_factory, value, key, number
) -> None:
    """An attacker can compute a checksum: what is whole may still be nonsense."""
    reader = next(r for r in READERS if r.name == "manifest.json")
    data = json.loads(reader.seeds()[number])
    data.pop("checksum")
    (data if key in data else data["info"])[key] = value
    read(reader, json.dumps(seal(data)).encode(), tmp_path_factory.mktemp("sealed"))
