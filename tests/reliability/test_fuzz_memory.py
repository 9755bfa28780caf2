"""Headers that claim what is not there, bombs, and places outside: refused within bounded memory and time."""

import contextlib
import gzip
import json
import lzma
import os
import resource
import struct
import subprocess
import sys
import tracemalloc
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

sys.path.append(str(Path(__file__).resolve().parents[2]))
from acts_models import make_tokenizer
from benchmarks.reliability.mutate import mutated
from benchmarks.reliability.readers import READERS

from wsae.acts.config import HarvestConfig, ImagesConfig, TextConfig
from wsae.acts.images.sets import open_images
from wsae.acts.source import open_source
from wsae.acts.text import PIECE, Packer, documents, pieces
from wsae.cli.live import read_vector
from wsae.core.artifact import contained, write_manifest
from wsae.core.errors import UserError
from wsae.core.files import read_json
from wsae.core.tensors import MOST_TIMES, PLAIN_UNPACKED, check_unpacked, load_tensors
from wsae.sae import SAE, SAEConfig, TopK
from wsae.train.run import load_run

HUGE = 1 << 40
ROOM = 512 << 20
"""Bytes of address space that reading any of these may take on top of what the libraries hold."""


def npy(shape: str, dtype: str = "'<f4'", body: bytes = b"") -> bytes:
    header = f"{{'descr': {dtype}, 'fortran_order': False, 'shape': {shape}, }}".encode()
    header += b" " * (-(11 + len(header)) % 64) + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header + body


def zipped(path: Path, method: int, **entries: bytes) -> Path:
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, data in entries.items():
            archive.writestr(f"{name}.npy", data)
    return path


def safetensors(path: Path, shape: tuple[int, int] = (HUGE, 4), end: int = 16 * HUGE) -> Path:
    header = b'{"x":{"dtype":"F32","shape":[%d,%d],"data_offsets":[0,%d]}}' % (*shape, end)
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(64))
    return path


def idx(path: Path, *shape: int, body: bytes = b"") -> Path:
    path.mkdir(exist_ok=True)
    data = bytes([0, 0, 8, 3]) + np.array(shape, ">u4").tobytes() + body
    (path / "train-images-idx3-ubyte.gz").write_bytes(gzip.compress(data, 1))
    return path


def picture_bomb(path: Path, side: int = 50_000) -> Path:
    """A PNG of so many pixels squared, in a few kilobytes."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    path.mkdir(exist_ok=True)
    head = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    data = (
        chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(bytes(1 << 20))) + chunk(b"IEND", b"")
    )
    (path / "x.png").write_bytes(b"\x89PNG\r\n\x1a\n" + data)
    return path


def damaged_statistics(path: Path) -> Path:
    """A table whose description of a column makes Arrow itself end the process (mutation 3337 of a sound one)."""
    reader = next(r for r in READERS if r.name == "images.parquet")
    path.write_bytes(mutated(reader.seeds()[1], 3337))
    return path


def pixels(n: int) -> str:
    return f"({n}, 8, 8)"


def images(path: Path) -> object:
    found = open_images(ImagesConfig(path=str(path)))
    return found.image(0)


def vector(path: Path) -> object:
    return read_vector("--labels", path, "iu", "one whole number per row")


POSTSCRIPT = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\nshowpage\n"
ONE = npy(pixels(1), "'|u1'", bytes(64))
LABEL = npy("(1,)", "'<i8'", HUGE.to_bytes(8, "little"))
CASES = {
    "npy of 2^40 rows": (lambda d: write(d / "x.npy", npy(f"({HUGE}, 4)")), open_source),
    "npy of 2^40 labels": (lambda d: write(d / "y.npy", npy(f"({HUGE},)", "'<i8'")), vector),
    "npy beyond 64 bits": (lambda d: write(d / "x.npy", npy(f"({HUGE}, {HUGE})")), open_source),
    "npy of a number too long": (lambda d: write(d / "x.npy", npy(f"({'9' * 40}, 4)")), open_source),
    "npy of truths": (lambda d: write(d / "x.npy", npy("(True, 4)")), open_source),
    "npy of a header cut": (lambda d: write(d / "x.npy", npy("(2, 4")), open_source),
    "npy of objects": (lambda d: write(d / "x.npy", npy("(1, 1)", "'|O'", b"cos\nsystem\n")), open_source),
    "npy of no rows, each of 2^62": (lambda d: write(d / "x.npy", npy(f"(0, {1 << 62})")), open_source),
    "safetensors of no rows, each of 2^62": (lambda d: safetensors(d / "x.safetensors", (0, 1 << 62), 0), open_source),
    "npy of nothing": (lambda d: write(d / "x.npy", npy(f"({HUGE}, 4)", "'|S0'")), open_source),
    "npy that is a zip": (lambda d: zipped(d / "x.npy", zipfile.ZIP_STORED, x=npy("(1, 1)")), open_source),
    "npz of 2^40 images": (lambda d: zipped(d / "x.npz", 0, images=npy(pixels(HUGE), "'|u1'")), images),
    "npz of 2^40 images, packed": (lambda d: zipped(d / "x.npz", 8, images=npy(pixels(HUGE), "'|u1'")), images),
    "npz of 2^40 labels": (
        lambda d: zipped(d / "x.npz", 8, images=ONE, labels=npy(f"({HUGE},)", "'<i8'")),
        images,
    ),
    "npz whose label is 2^40": (
        lambda d: zipped(d / "x.npz", 0, images=ONE, labels=LABEL),
        images,
    ),
    "npz that reaches into its neighbour": (
        lambda d: zipped(d / "x.npz", 0, images=npy(pixels(4), "'|u1'", bytes(64)), other=bytes(900)),
        images,
    ),
    "npz bomb": (lambda d: zipped(d / "x.npz", 8, images=npy(pixels(1 << 23), "'|u1'", bytes(64 << 23))), images),
    "IDX of 2^40 pixels": (lambda d: idx(d / "i", 1 << 20, 1 << 10, 1 << 10), images),
    "IDX bomb": (lambda d: idx(d / "i", 1 << 23, 8, 8, body=bytes(1 << 20)), images),
    "safetensors of 2^40 rows": (lambda d: safetensors(d / "x.safetensors"), open_source),
    "safetensors of 2^40 rows, whole": (lambda d: safetensors(d / "x.safetensors"), load_tensors),
    "picture bomb": (lambda d: picture_bomb(d / "p"), images),
    "npz whose names have lines": (lambda d: zipped(d / "x.npz", 0, **{"a\nb\x1b[2J": ONE}), images),
    "PostScript called PNG": (lambda d: write(d / "p" / "x.png", POSTSCRIPT).parent, images),
}  # fmt: skip


def write(path: Path, data: bytes) -> Path:
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(data)
    return path


@pytest.fixture
def little_room():
    """Leave this process room for `ROOM` more bytes, where the system tells what it holds (Linux)."""
    statm, before = Path("/proc/self/statm"), resource.getrlimit(resource.RLIMIT_AS)

    def limit() -> None:
        if statm.exists():
            used = int(statm.read_text().split()[0]) * resource.getpagesize()
            resource.setrlimit(resource.RLIMIT_AS, (used + ROOM, before[1]))

    yield limit
    resource.setrlimit(resource.RLIMIT_AS, before)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.timeout(120)
def test_no_header_makes_memory_be_reserved_for_data_not_there(name, tmp_path, little_room) -> None:
    make, read = CASES[name]
    path = make(tmp_path)
    little_room()
    with pytest.raises(UserError, match=str(path)) as caught:
        read(path)
    assert "\n" not in str(caught.value)


def test_the_limit_on_unpacking_is_for_bombs_and_not_for_pictures() -> None:
    packed = PLAIN_UNPACKED // 10
    check_unpacked(10 * packed, packed, "x", "mend")
    check_unpacked(PLAIN_UNPACKED, 10, "x", "mend")
    with pytest.raises(UserError, match="unpacks to .* from .*; mend"):
        check_unpacked(PLAIN_UNPACKED + 1, PLAIN_UNPACKED // MOST_TIMES, "x", "mend")


def test_an_array_packed_or_not_is_the_one_that_was_saved(tmp_path) -> None:
    """The readers written for distrust agree with numpy's own, in every order of bytes and axes."""
    rng = np.random.default_rng(0)
    for dtype in ("<f4", ">f4", "<f8", ">i2", "u1"):
        for order in ("C", "F"):
            x = np.asarray(rng.integers(0, 99, (7, 5)), dtype=dtype, order=order)
            np.save(tmp_path / "x.npy", x)
            got = open_source(tmp_path / "x.npy")._rows.take(np.arange(7)).numpy()
            assert (got == x).all()
    pictures = np.asfortranarray(rng.integers(0, 256, (4, 6, 5), dtype=np.uint8))
    for save in (np.savez, np.savez_compressed):
        save(tmp_path / "x.npz", images=pictures, labels=np.arange(4), names=np.array(list("abcd")))
        found = open_images(ImagesConfig(path=str(tmp_path / "x.npz")))
        assert (found.images(np.arange(4))[:, 0].numpy() == pictures).all()
        assert (found.names, found.labels.tolist()) == (tuple("abcd"), [0, 1, 2, 3])


def packed_reader(path: Path, field: str = "text", **options) -> Packer:
    """Return what cuts a text into sequences, with a tokenizer of bytes."""
    text = TextConfig(path=str(path), field=field)
    cfg = HarvestConfig(text=text, seq_len=16, heldout_fraction=0.0, heldout_tokens=0, **options)
    return Packer(cfg, make_tokenizer(), heldout=False)


@pytest.mark.parametrize("pack", [True, False])
def test_memory_does_not_grow_with_records_that_are_skipped(tmp_path, pack) -> None:
    rows, peaks = b'{"text": ""}\n{"text": ""}\n{"text": null}\n{"x": 1}\n\n', []
    for n in (300, 1_500):
        data = b'{"text": "a"}\n' + rows * n + b'{"text": "b c"}\n'
        path = write(tmp_path / f"{n}.jsonl.gz", gzip.compress(data, 1))
        packer = packed_reader(path, pack=pack)
        tracemalloc.start()
        found = list(packer.sequences())
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        assert len(found) == (1 if pack else 2)
    assert peaks[1] < peaks[0] + (1 << 17)


def dictionary_bomb(path: Path) -> Path:
    import pyarrow as pa
    import pyarrow.parquet as pq

    said = pa.array(["x" * (24 << 20)])
    often = pa.DictionaryArray.from_arrays(pa.array([0] * 1000, pa.int32()), said)
    pq.write_table(pa.table({"text": often}), path, compression="zstd")
    assert path.stat().st_size < 1 << 16
    return path


def xz(data: bytes, dictionary: int = 1 << 20) -> bytes:
    filters = [{"id": lzma.FILTER_LZMA2, "preset": 0, "dict_size": dictionary}]
    return lzma.compress(data, filters=filters)


TEXTS = {
    "spaces.txt.gz": (lambda: gzip.compress(b" " * (64 << 20), 1), ""),
    "one line.txt.xz": (lambda: xz(b"a " * (8 << 20)), ""),
    "empty.json": (lambda: b"[" + b'{"text": ""},' * 9_000 + b'{"text": ""}]', ""),
    "lists.jsonl": (lambda: b'{"text": "a", "x": [' + b"[]," * 4_000_000 + b"[]]}", "values in one"),
    "deep.jsonl": (lambda: b"[" * 4_000_000, "values in one record"),
    "objects.json": (lambda: b'[{"x": [' + b'{"a":0},' * 2_000_000, "values in one record"),
    "strings.json": (lambda: b'{"text": [' + b'"a",' * 4_000_000, "values in one record"),
    "no end.json.gz": (lambda: gzip.compress(b'{"text": "' + b"a" * (80 << 20), 1), "over 67,108,864"),
    "no end.jsonl.gz": (lambda: gzip.compress(b'{"text": "' + b"a" * (80 << 20), 1), "over 67,108,864"),
    "open.csv.gz": (lambda: gzip.compress(b'text\n"' + b"a\n" * (9 << 20), 1), "is a quote left open"),
    "line.csv.gz": (lambda: gzip.compress(b"text\n" + b"a" * (80 << 20), 1), "a row of over"),
    "cells.csv": (lambda: b"text\n" + b"," * (8 << 20), "cells"),
    "dictionary.jsonl.xz": (lambda: xz(b'{"text": "a"}\n', 512 << 20), "over 256 MB to unpack"),
}  # fmt: skip


@pytest.mark.parametrize("name", TEXTS)
@pytest.mark.timeout(120)
def test_a_small_text_cannot_fill_the_memory(name, tmp_path, little_room) -> None:
    make, said = TEXTS[name]
    path = write(tmp_path / name, make())
    little_room()
    refused = pytest.raises(UserError, match=said) if said else contextlib.nullcontext()
    with refused:
        for document in documents(TextConfig(path=str(path))):
            assert len(document.text) < 1 << 20


def test_a_table_that_says_one_text_in_every_row_is_read_a_few_rows_at_a_time(
    tmp_path, little_room
) -> None:
    path = dictionary_bomb(tmp_path / "x.parquet")
    little_room()
    found = documents(TextConfig(path=str(path)))
    assert {len(next(found).text) for _ in range(40)} == {24 << 20}


def test_a_long_document_is_tokenised_in_pieces_cut_before_words(tmp_path) -> None:
    text = "the cat sat on a mat  and\nsaw two dogs " * 40_000
    parts = list(pieces(text))
    assert "".join(parts) == text
    assert max(map(len, parts)) <= PIECE < len(text)
    assert all(part[0] == " " and part[1].isalpha() for part in parts[1:])
    assert [*map(len, pieces("x" * (PIECE + 1)))] == [PIECE, 1]
    packer = packed_reader(write(tmp_path / "x.jsonl", json.dumps({"text": text}).encode()))
    ids = np.concatenate([s.ids[: s.length] for s in packer.sequences()])
    whole = make_tokenizer()(text, add_special_tokens=False)["input_ids"]
    assert ids.tolist() == [*whole, 1]


def test_many_pixels_of_few_bytes_are_refused_below_pillows_own_limit(tmp_path) -> None:
    with pytest.raises(UserError, match=r"25,000,000 pixels out of [\d,]+ bytes"):
        images(picture_bomb(tmp_path / "p", 5_000))
    with pytest.raises(
        UserError, match="truncated"
    ):  # 4,000: Pillow's own word for what is not there
        images(picture_bomb(tmp_path / "p", 4_000))


def test_a_chunk_that_claims_gigabytes_takes_no_memory(tmp_path, little_room) -> None:
    """Its pixels are all there, so that Pillow reads on to the chunk's end."""
    whole = png(tmp_path / "p" / "x.png")
    data = whole.read_bytes()
    at = data.index(b"IDAT")
    whole.write_bytes(data[: at - 4] + struct.pack(">I", 0xFFFFFFFF) + data[at:])
    little_room()
    assert images(tmp_path / "p").sum() == 0


READ = """
import sys
from wsae.acts.config import ImagesConfig
from wsae.acts.images.sets import open_images
from wsae.core.errors import UserError
import pyarrow.parquet as pq
if sys.argv[2] == "wsae":
    try:
        open_images(ImagesConfig(path=sys.argv[1])).image(0)
    except UserError:
        pass
else:
    pq.ParquetFile(sys.argv[1]).metadata.row_group(0).column(0)
"""


def test_a_table_that_ends_arrows_process_does_not_end_ours(tmp_path) -> None:
    path = damaged_statistics(tmp_path / "images.parquet")
    ends = {
        who: subprocess.run(
            [sys.executable, "-c", READ, str(path), who], capture_output=True, check=False
        ).returncode
        for who in ("arrow", "wsae")
    }
    if ends["arrow"] == 0:
        pytest.skip("this Arrow reads what it once died of, or wrote the sound table otherwise")
    assert ends["wsae"] == 0


# ---- places outside


def png(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.zeros((4, 4, 3), np.uint8)).save(path)
    return path


def test_links_between_image_folders_are_followed_but_not_in_circles(tmp_path) -> None:
    png(tmp_path / "elsewhere" / "b" / "1.png")
    png(tmp_path / "set" / "a" / "1.png")
    (tmp_path / "set" / "b").symlink_to(tmp_path / "elsewhere" / "b")
    found = open_images(ImagesConfig(path=str(tmp_path / "set")))
    assert (len(found), found.names) == (2, ("a", "b"))
    (tmp_path / "set" / "a" / "up").symlink_to(tmp_path / "set")
    with pytest.raises(UserError, match="links lead to this folder twice"):
        open_images(ImagesConfig(path=str(tmp_path / "set")))


def test_a_pipe_among_images_or_records_is_no_file_and_nobody_waits_for_it(tmp_path) -> None:
    png(tmp_path / "set" / "a" / "1.png")
    os.mkfifo(tmp_path / "set" / "a" / "2.png")
    assert len(open_images(ImagesConfig(path=str(tmp_path / "set")))) == 1
    os.mkfifo(tmp_path / "manifest.json")
    with pytest.raises(UserError, match="manifest.json: is a pipe"):
        read_json(tmp_path / "manifest.json")


def test_a_table_names_no_image_outside_its_folder(tmp_path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    png(tmp_path / "secret.png")
    png(tmp_path / "set" / "own.png")
    (tmp_path / "set" / "link.png").symlink_to(tmp_path / "secret.png")
    names = ["own.png", "../secret.png", str(tmp_path / "secret.png"), "link.png", "a\0b"]
    cells = [{"bytes": None, "path": name} for name in names]
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    pq.write_table(pa.table({"image": pa.array(cells, kind)}), tmp_path / "set" / "x.parquet")
    found = open_images(ImagesConfig(path=str(tmp_path / "set" / "x.parquet")))
    assert found.image(0).shape == (3, 4, 4)
    for row in range(1, len(names)):
        with pytest.raises(UserError, match=f"row {row}: names a file outside"):
            found.image(row)


def test_no_record_leads_outside_its_directory(tmp_path) -> None:
    sae = SAE(SAEConfig(d_in=2, d_sae=4, activation=TopK(k=1)))
    sae.save(tmp_path / "outside" / "plain")
    run = tmp_path / "run"
    run.mkdir()
    (run / "members").mkdir()
    (run / "members" / "link").symlink_to(tmp_path / "outside")
    outside = "manifest.json: names a file outside the directory"
    for hook, words in (
        ("../../outside", outside),
        ("link", outside),
        (str(tmp_path / "outside"), "no such directory"),  # looked for below members/
    ):
        write_manifest(run, "run", {}, [], info={"members": {hook: ["plain"]}})
        with pytest.raises(UserError, match=words):
            load_run(run)
    for name in ("a\0b", "x" * 5000, "\ud800"):
        with pytest.raises(UserError, match=r"names no possible file"):
            contained(run, name)
    (run / "loop").symlink_to(run / "loop")
    with pytest.raises(UserError, match=r"names no possible file"):
        contained(run, "loop")


# ---- time


def test_a_string_of_quotes_is_no_reason_to_wait(tmp_path) -> None:
    """Looking for the lines of keys inside strings took a time that grew with the square of their length."""
    code = (
        "from pathlib import Path\nfrom wsae.core.config import read_config\n"
        "import sys\nprint(len(read_config(Path(sys.argv[1])).data['a']))"
    )
    path = tmp_path / "x.json"
    path.write_text('{"a": "' + '\\"' * 2_000_000 + '"}')
    done = subprocess.run(
        [sys.executable, "-c", code, str(path)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.stdout.strip() == "2000000", done.stderr
