"""The shape of the code: what is imported when, sizes, and that every list of names says the truth."""

import ast
import importlib
import json
import os
import pkgutil
import re
import subprocess
import sys
from pathlib import Path

import pytest
from sources import parsed

import wsae
from wsae.cli import table
from wsae.cli.bench import ShapeFlags
from wsae.cli.reproduce import VisionFlags
from wsae.cli.toy import NoiseFlags
from wsae.core.config import Config
from wsae.studies.figures import Panel

ROOT = Path(__file__).resolve().parents[2]
SRC = ROOT / "src" / "wsae"
SOURCES = sorted(SRC.rglob("*.py"))
FILE_LINES, FUNCTION_LINES = 760, 60
FILES, EDGES, LONE_MODULES, TUPLES, CLASS_NAMES_TWICE = 207, 1341, 0, 0, 0
"""Ratchets: they only go down, but for the files of a new subject."""
HEAVY = ("torch", "numpy", "transformers", "scipy")
IGNORES, SKIPS = 5, 18
"""Ratchets: how many checks of types are ignored (src) and unconditional or conditional skips (tests) there may be."""


FORKS = """
import json, os, sys
lines, watched, first = json.loads(sys.argv[1])
for name in first:
    __import__(name)
assert "wsae" not in sys.modules
for line in lines:
    read, write = os.pipe()
    if os.fork() == 0:
        os.dup2(2, 1)
        exec(line)
        os.write(write, json.dumps([m for m in watched if m in sys.modules]).encode())
        os._exit(0)
    os.close(write)
    with os.fdopen(read) as answer:
        told = answer.read()
    assert os.wait()[1] == 0 and told, line
    print(told)
"""
"""Runs each line in a fork of its own, so that what all may load is loaded but once."""


def loaded_by(lines: list[str], first: tuple[str, ...] = ()) -> list[set[str]]:
    """Return the heavy modules that each line loads in a fresh interpreter, which had imported `first`."""
    job = json.dumps([lines, [*HEAVY, "pydantic", "tyro", "rich"], first])
    done = subprocess.run(
        [sys.executable, "-c", FORKS, job], capture_output=True, text=True, check=False, timeout=250
    )
    assert done.returncode == 0, done.stderr
    return [set(json.loads(told)) for told in done.stdout.splitlines()]


def test_importing_the_package_and_the_overview_help_load_the_standard_library_alone():
    help_ = "from wsae.cli.main import main\nmain(['--help'])"
    assert loaded_by(["import wsae", help_]) == [set(), set()]


def test_threads_that_wait_soon_sleep_unless_the_user_has_said_how_long():
    """PyTorch's read the first of these, NumPy's the second, each when it is first imported."""
    names, theirs = ("GOMP_SPINCOUNT", "OPENBLAS_THREAD_TIMEOUT"), "26"
    for before in ({}, dict.fromkeys(names, theirs)):
        env = {k: v for k, v in os.environ.items() if k not in names} | before
        code = f"import os, wsae; print(*(os.environ[name] for name in {names}))"
        done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
        assert done.stdout.split() == ([theirs, theirs] if before else ["1000", "4"])


def test_the_help_of_no_command_loads_torch():
    names = table.names()
    lines = [f"from wsae.cli.main import main\nmain(['{name}', '--help'])" for name in names]
    for name, found in zip(names, loaded_by(lines, ("pydantic", "tyro", "rich")), strict=True):
        assert found.isdisjoint(HEAVY), f"wsae {name} --help imports {found & set(HEAVY)}"


def test_config_modules_are_torch_free():
    paths = [path.relative_to(SRC.parent) for path in SOURCES if path.name.endswith("config.py")]
    names = [".".join(path.with_suffix("").parts) for path in paths]
    lines = [f"import {name}" for name in names]
    for name, found in zip(names, loaded_by(lines, ("pydantic",)), strict=True):
        assert found.isdisjoint(HEAVY), f"{name} imports {found & set(HEAVY)}"
    assert "torch" in loaded_by(["import wsae.train.loop"])[0]  # it can tell


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(SRC)))
def test_files_and_functions_are_of_one_subject(path):
    """Bounds against runaways. A file is one subject that a reader wants to read in one go, however long that is."""
    text = path.read_text()
    assert len(text.splitlines()) < FILE_LINES, (
        f"{path.name}: more than one subject? split it by meaning"
    )
    for node in ast.walk(parsed(SRC)[path]):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            lines = (node.end_lineno or node.lineno) - node.lineno + 1
            assert lines <= FUNCTION_LINES, (
                f"{path.name}:{node.lineno} {node.name} has {lines} lines"
            )


def module_of(path: Path) -> str:
    parts = path.relative_to(SRC.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def trees() -> dict[str, ast.Module]:
    return {module_of(path): tree for path, tree in parsed(SRC).items()}


def edges() -> set[tuple[str, str]]:
    """Return who imports whom inside the package, imports inside functions included."""
    found, known = set(), trees()
    for name, tree in known.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom):
                assert node.module, f"{name}:{node.lineno}: a relative import"
                for alias in node.names:
                    whole = f"{node.module}.{alias.name}"
                    found.add((name, whole if whole in known else node.module))
            if isinstance(node, ast.Import):
                found |= {(name, alias.name) for alias in node.names}
    return {(a, b) for a, b in found if b in known and a != b}


def test_a_walk_through_the_package_stays_short():
    """What makes a package hard to learn, counted: a number goes up with a new subject alone (docs/architecture.md)."""
    lines = {module_of(path): len(path.read_text().splitlines()) for path in SOURCES}
    importers: dict[str, set[str]] = {}
    for importer, imported in edges():
        importers.setdefault(imported, set()).add(importer)
    packages = {module_of(path) for path in SOURCES if path.name == "__init__.py"}
    lone = [
        name
        for name, n in lines.items()
        if n <= 80 and len(importers.get(name, ())) == 1 and name not in packages
    ]
    assert len(lone) <= LONE_MODULES, f"join each with its one importer: {lone}"
    assert len(edges()) <= EDGES, f"{len(edges())} import edges"
    assert len(lines) <= FILES, f"{len(lines)} files"


def test_no_parameter_is_an_anonymous_tuple():
    """Two things that travel together have a name, or travel apart."""
    found = [
        f"{name}:{node.lineno} {node.name}({arg.arg})"
        for name, tree in trees().items()
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        for arg in [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
        if arg.annotation is not None
        and ast.unparse(arg.annotation).startswith("tuple[")
        and "..." not in ast.unparse(arg.annotation)
    ]
    assert len(found) <= TUPLES, "\n".join(found)


def test_a_class_name_means_one_thing():
    where: dict[str, list[str]] = {}
    for name, tree in trees().items():
        for node in ast.walk(tree):
            if isinstance(node, ast.ClassDef):
                where.setdefault(node.name, []).append(name)
    where.pop("Flags", None)  # of each command: the convention that a test below checks
    twice = {name: found for name, found in where.items() if len(found) > 1}
    assert len(twice) <= CLASS_NAMES_TWICE, twice


ALLOCATING = {"zeros", "ones", "empty", "rand", "randn", "full", "eye", "linspace", "normal"}


def test_every_new_tensor_states_its_type():
    """A default type belongs to the user's process: kernels, files and statistics must not follow it."""
    found = []
    for path in sorted(SRC.rglob("*.py")):
        for node in ast.walk(parsed(SRC)[path]):
            if not isinstance(node, ast.Call) or "dtype" in {word.arg for word in node.keywords}:
                continue
            name = ast.unparse(node.func)
            if name.startswith("torch.") and name.removeprefix("torch.") in ALLOCATING:
                found.append(f"{path}:{node.lineno}: {ast.unparse(node)}")
    assert not found, "\n".join(found)


def test_every_command_has_a_module_and_every_module_a_command():
    """A module with `run` and `Flags` is a command; the table lists exactly those."""
    found = set()
    for info in pkgutil.iter_modules([str(SRC / "cli")]):
        names = {n.name for n in ast.parse((SRC / "cli" / f"{info.name}.py").read_text()).body
                 if isinstance(n, ast.FunctionDef | ast.ClassDef)}  # fmt: skip
        if {"Flags", "run", "show"} <= names:
            found.add(f"wsae.cli.{info.name}")
    assert found == {command.module for command in table.COMMANDS}


def test_every_exported_name_is_there():
    for name in wsae.__all__:
        assert getattr(wsae, name) is not None
    assert list(wsae.__all__) == sorted(wsae.__all__, key=str.lower) or sorted(
        wsae.__all__
    ) == list(wsae.__all__)
    with pytest.raises(AttributeError, match="nothing_of_the_kind"):
        _ = wsae.nothing_of_the_kind


def configs() -> list[type[Config]]:
    """Return every Config class of the package."""
    for path in SOURCES:
        if "class " in path.read_text() and "Config)" in path.read_text():
            importlib.import_module(".".join(path.relative_to(SRC.parent).with_suffix("").parts))
    found, todo = [], [Config]
    while todo:
        for kind in todo.pop().__subclasses__():
            todo.append(kind)
            if kind.__module__.startswith("wsae."):
                found.append(kind)
    return sorted(set(found), key=lambda kind: (kind.__module__, kind.__name__))


WRITTEN_WHOLE = {Panel, NoiseFlags, ShapeFlags, VisionFlags}
"""Results in the form of a Config, which people and files get field by field or not, and flags handed on whole."""
ELSEWHERE = {"Provenance.notes", "Flags.scale"}
"""Read where their class is not named: of what `about_sae` returns, and by the names in `wsae.use.steer.KINDS`."""


def words(text: str) -> set[str]:
    return set(re.findall(r"\w+", text))


def names_of(kinds: list[type[Config]]) -> dict[type[Config], set[str]]:
    """Return for each Config the names that a module which reads it holds: its own, its owners', of constants of it."""
    typed = [
        (node.target.id, words(ast.unparse(node.annotation)))
        for tree in parsed(SRC).values()
        for node in tree.body
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)
    ]
    said = {
        kind: words(" ".join(str(f.annotation) for f in kind.model_fields.values()))
        for kind in kinds
    }
    found = {kind: {kind.__name__, *(k.__name__ for k in kind.__subclasses__())} for kind in kinds}
    for _ in range(4):  # a TrainConfig holds a MemberConfig holds a GammaConfig
        for names in found.values():
            names |= {owner.__name__ for owner in kinds if names & said[owner]}
    for names in found.values():
        names |= {constant for constant, of in typed if names & of}
    return found


def test_every_config_field_is_read_where_its_config_is_known():
    """As an attribute, in a pattern, or by its name in quotes, in a module that names the config or one holding it."""
    read = []
    for path in SOURCES:
        got = set[str]()
        read.append((words(path.read_text()), got))
        for node in ast.walk(parsed(SRC)[path]):
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
                got.add(node.attr)
            elif isinstance(node, ast.MatchClass):
                got.update(node.kwd_attrs)
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                got.add(node.value)
    for kind, names in names_of(configs()).items():
        if kind in WRITTEN_WHOLE or kind.__name__ == "ConfigFlags":
            continue
        near = set().union(*(found for text, found in read if names & text))
        made = [base.model_fields for base in kind.__mro__ if base.__name__ == "ConfigFlags"]
        unread = set(kind.model_fields).difference(
            near, *made
        )  # flags made from configs are read by name
        unread = {f"{kind.__name__}.{name}" for name in unread} - ELSEWHERE
        assert not unread, f"{kind.__module__}: never read: {unread}"


def test_every_config_field_says_what_it_means_to_the_command_line():
    """Fields of command-line flags carry the help text; that of a group is its class's unless the field has another."""
    flags = [kind for kind in configs() if kind.__module__.startswith("wsae.cli.")]
    assert {kind.__module__ for kind in flags} >= {command.module for command in table.COMMANDS}
    for kind in flags:
        for name, field in kind.model_fields.items():
            group = isinstance(field.annotation, type) and issubclass(field.annotation, Config)
            told = field.description or (group and field.annotation.__doc__)
            assert told, f"{kind.__module__}.{kind.__name__}.{name} has no help"


def tracked() -> list[Path]:
    done = subprocess.run(
        ["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        pytest.skip("not a git checkout")
    return [ROOT / name for name in done.stdout.split("\0") if name and (ROOT / name).is_file()]


def test_no_file_points_outside_the_project():
    """No folder beside the checkout, no absolute path of somebody's machine, no package host."""
    outside = re.compile(
        r"\.\./shared|\bshared/data|/(?:home|Users|work|root)/\w|index-url|find-links"
    )
    for path in tracked():
        if path.suffix in (".gz", ".png", ".npz", ".parquet", ".safetensors") or path == Path(
            __file__
        ):
            continue
        for number, line in enumerate(path.read_text(errors="replace").splitlines(), start=1):
            assert not outside.search(line), (
                f"{path.relative_to(ROOT)}:{number}: {line.strip()[:80]}"
            )


def test_every_version_is_pinned_and_the_ranges_admit_the_pins():
    from importlib.metadata import requires

    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name

    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = dict(line.split("==") for line in lines if line and not line.startswith("#"))
    assert pins["torch"] == "2.13.0"
    for text in requires("wsae") or []:
        need = Requirement(text)
        name = canonicalize_name(need.name)
        if name != "wsae":
            assert name in pins, f"{name} is not pinned"
            assert need.specifier.contains(pins[name]), f"{need} does not admit {pins[name]}"


def test_debts_only_shrink():
    ignores = sum(len(re.findall(r"(?:type|pyright): ignore", p.read_text())) for p in SOURCES)
    tests = [p for p in (ROOT / "tests").rglob("test_*.py") if p != Path(__file__)]
    skips = sum(
        len(re.findall(r"\bpytest\.(?:(?:mark\.)?skip(?:if)?|importorskip)\b", p.read_text()))
        for p in tests
    )
    assert ignores <= IGNORES
    assert skips <= SKIPS
