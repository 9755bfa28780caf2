"""Coverage-guided fuzzing (atheris) of the readers that are Python all through, where it finds what chance does not.

    python -m benchmarks.reliability.guided NAME [libFuzzer's flags, as -max_total_time=60]

NAME is a reader's of `readers.py` (x.yaml, x.json, x.npy, images.npz, manifest.json, ...). Needs `pip install atheris`
(wheels for Python 3.11-3.13), which is no dependency of this project. Ends at the first exception that is no UserError.
"""

import os
import sys
import tempfile
from pathlib import Path

import atheris
from benchmarks.reliability.common import ENVIRONMENT
from benchmarks.reliability.readers import READERS


def main() -> None:
    os.environ.update(ENVIRONMENT)
    name, *flags = sys.argv[1:]
    reader = next(reader for reader in READERS if reader.name == name)
    corpus, folder = Path(tempfile.mkdtemp()), Path(tempfile.mkdtemp()) / "evaluation"
    folder.mkdir()
    with atheris.instrument_imports(include=["wsae", "yaml", "numpy.lib", "zipfile"]):
        from wsae.core.errors import UserError

        for number, seed in enumerate(reader.seeds()):
            (corpus / str(number)).write_bytes(seed)
            (folder / name).write_bytes(seed)
            try:
                reader.call(folder / name)  # imports what it needs
            except UserError as error:
                print(error)

    def one(data: bytes) -> None:
        (folder / name).write_bytes(data)
        try:
            reader.call(folder / name)
        except UserError as error:
            if str(folder) not in str(error) or "\n" in str(error):
                raise RuntimeError(f"not one line that names the file: {error}") from error

    atheris.Setup([sys.argv[0], *flags, "-rss_limit_mb=4096", "-timeout=20", str(corpus)], one)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
