"""No path from a file to code: what the sources may not say, and what the readers refuse."""

import ast
import os
import pickle
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from wsae.acts.source import open_source
from wsae.core.errors import UserError
from wsae.core.torchfile import load_state

SRC = Path(__file__).resolve().parents[1] / "src" / "wsae"
SOURCES = sorted(SRC.rglob("*.py"))
MODULES = (
    "pickle",
    "cPickle",
    "dill",
    "cloudpickle",
    "shelve",
    "marshal",
    "joblib",
    "code",
    "jsonpickle",
)
CALLS = {
    *("eval", "exec", "compile", "__import__", "yaml.load", "yaml.unsafe_load", "yaml.full_load"),
    *("torch.jit.load", "torch.hub.load", "torch.package.PackageImporter", "pd.read_pickle"),
    *("os.system", "os.popen", "tarfile.open", "shutil.unpack_archive", "np.fromregex"),
}
METHODS = ("extractall", "extract", "unpack_archive")
ALLOWED = {("core/torchfile.py", "pickle")}
"""For the name of an exception; its `torch.load` is fenced in, and tested below."""


def offences(text: str, name: str) -> Iterator[str]:
    """Yield what in a source could run code that a file brings."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = (
                [a.name for a in node.names]
                if isinstance(node, ast.Import)
                else [node.module or ""]
            )
            for module in names:
                if module.split(".")[0] in MODULES and (name, module) not in ALLOWED:
                    yield f"{name}:{node.lineno} imports {module}"
        if isinstance(node, ast.Call):
            yield from _in_call(node, name)


def _in_call(node: ast.Call, name: str) -> Iterator[str]:
    called = ast.unparse(node.func)
    given = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
    where = f"{name}:{node.lineno} calls {called}"
    if called in CALLS or called.split(".")[-1] in METHODS:
        yield where
    if called == "torch.load" and given.get("weights_only") != "True":
        yield f"{where} without weights_only=True"
    if called in ("np.load", "numpy.load") and given.get("allow_pickle") != "False":
        yield f"{where} without allow_pickle=False"
    if given.get("allow_pickle") == "True" or given.get("shell") == "True":
        yield f"{where} with {given}"
    if "trust_remote_code" in given and given["trust_remote_code"] != "False":
        yield f"{where} with trust_remote_code={given['trust_remote_code']}"
    of_hub = called.startswith("Auto") and called.endswith("from_pretrained")
    if of_hub and "trust_remote_code" not in given and None not in given:  # ** may hold it
        yield f"{where} without trust_remote_code=False"


def test_no_source_can_run_what_a_file_brings() -> None:
    found = [
        line for path in SOURCES for line in offences(path.read_text(), str(path.relative_to(SRC)))
    ]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    "text",
    [
        "import pickle",
        "from dill import loads",
        "eval(x)",
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "np.load(path)",
        "np.load(path, allow_pickle=True)",
        "yaml.load(text, Loader)",
        "archive.extractall(place)",
        "AutoModel.from_pretrained(name)",
        "kind.from_pretrained(name, trust_remote_code=trust)",
        "subprocess.run(line, shell=True)",
    ],
)
def test_the_search_finds_each_of_them(text: str) -> None:
    assert list(offences(text, "x.py"))


class Bad:
    """Makes a folder when it is unpickled."""

    def __init__(self, place: Path) -> None:
        self.place = place

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.place),)


def test_a_pickle_called_anything_is_not_run(tmp_path: Path) -> None:
    made = tmp_path / "made"
    data = pickle.dumps(Bad(made))
    for name in ("x.npy", "x.safetensors", "x.pt", "x.npz"):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(UserError, match=name):
            open_source(tmp_path / name)
    np.save(tmp_path / "o.npy", np.array([[Bad(made)]], dtype=object), allow_pickle=True)
    with pytest.raises(UserError, match=r"o.npy: not a readable .npy array \(Python objects"):
        open_source(tmp_path / "o.npy")
    torch.save({"x": Bad(made)}, tmp_path / "ae.pt")
    with pytest.raises(UserError, match="ae.pt: not a state dict"):
        load_state(tmp_path / "ae.pt")
    assert not made.exists()
    pickle.loads(data)
    assert made.is_dir()  # it would have been
