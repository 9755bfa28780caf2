"""Nobody but `core/artifact.py` spells the names of a run's files, and only their writers and `Run` use them."""

import ast
from pathlib import Path

import pytest
from sources import parsed

import wsae.core.artifact as names

SRC = Path(__file__).resolve().parents[2] / "src" / "wsae"
OWNER = "core/artifact.py"
FILES = {
    *(names.MANIFEST, names.GAMMA_FILE, names.METRICS_FILE, names.SPEED, names.PROVENANCE),
    *(names.EVALUATION, names.INTERPRETATION, names.CLASSES, names.PROBING),
    *(names.ARRAYS, names.CONTEXTS_FILE, names.THUMBNAILS_FILE),
}
FOLDERS = {names.MEMBERS, names.CHECKPOINTS, *names.PARTS}
OTHERS_CONFIG = {
    *("acts/images/model.py", "acts/language.py", "cli/live.py"),
    *("interop/dictionary_learning.py", "interop/published.py", "serve/model.py"),
}
"""Who speaks of another config.json: of a model on the hub, an encoder of images, another tool's SAE."""


def trees() -> dict[str, ast.Module]:
    return {str(path.relative_to(SRC)): tree for path, tree in parsed(SRC).items()}


def spelled(tree: ast.AST) -> list[tuple[int, str]]:
    """Return line and name of every file of a run that a module spells, and of every folder in a path it makes."""
    docstrings = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    found = []
    for node in ast.walk(tree):
        match node:
            case ast.Constant(value=str(value)) if id(node) not in docstrings:
                if value in FILES | {names.CONFIG}:
                    found.append((node.lineno, value))
            case (
                ast.BinOp(op=ast.Div(), right=ast.Constant(value=str(value)))
                | ast.Call(func=ast.Name(id="Path"), args=[ast.Constant(value=str(value))])
            ) if value.split("/")[0] in FOLDERS:
                found.append((node.lineno, value))
            case ast.JoinedStr(values=[ast.Constant(value=str(value)), *_]) if (
                value.endswith("/") and value.split("/")[0] in FOLDERS
            ):
                found.append((node.lineno, value))
    return found


@pytest.mark.parametrize(
    ("code", "name"),
    [
        ("x = run / 'evaluation'", "evaluation"),
        ("x = run / 'members' / hook", "members"),
        ("x = Path('members') / hook", "members"),
        ("x = f'members/{hook}'", "members/"),
        ("x = run / 'gamma.json'", "gamma.json"),
        ("x = ['metrics.jsonl']", "metrics.jsonl"),
    ],
)
def test_a_name_is_found(code: str, name: str):
    assert spelled(ast.parse(code)) == [(1, name)]
    other = "'''config.json of a run'''\nx = found['members']\nprint(f'evaluation of {x}')"
    assert spelled(ast.parse(other)) == []


def test_the_names_of_a_runs_files_are_spelled_once():
    wrong = [
        f"{path}:{line} {name}"
        for path, tree in trees().items()
        for line, name in spelled(tree)
        if path != OWNER and not (name == names.CONFIG and path in OTHERS_CONFIG)
    ]
    assert wrong == []


@pytest.mark.parametrize(
    ("name", "writers"),
    [
        ("EVALUATION", {"evals/run.py"}),
        ("INTERPRETATION", {"evals/interpret/run.py"}),
        ("CLASSES", {"evals/classes.py"}),
        ("GAMMA_FILE", {"train/run.py", "train/parallel/run.py"}),
    ],
)
def test_the_records_of_a_run_are_opened_by_run_and_its_writers_alone(name: str, writers: set[str]):
    in_messages = {"cli/interpret.py", "evals/compare.py", "evals/run.py"}  # they name a wrong file
    users = {
        path
        for path, tree in trees().items()
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and name in [alias.name for alias in node.names]
    }
    assert users - in_messages == writers - in_messages | {"run.py"}
