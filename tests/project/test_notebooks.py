"""The notebooks tell what the code does: outputs are there and without errors, and the cells run, on less data."""

import importlib.util
import json
from pathlib import Path

import pytest
from acts_models import make_model

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "examples" / "notebooks"
NAMES = ("language_model", "published_sae", "toy_world", "trained_sae", "vision")


def builder():
    """Return the module that builds the notebooks."""
    spec = importlib.util.spec_from_file_location(
        "build_notebooks", ROOT / "examples" / "build_notebooks.py"
    )
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


BUILD = builder()


def book(name: str) -> dict:
    return json.loads((FOLDER / f"{name}.ipynb").read_text())


def test_each_source_has_its_notebook_and_none_is_left_over():
    assert tuple(path.stem for path in BUILD.sources()) == NAMES
    assert tuple(sorted(path.stem for path in FOLDER.glob("*.ipynb"))) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_a_notebook_holds_the_cells_of_its_source(name):
    found = [(cell["cell_type"], "".join(cell["source"])) for cell in book(name)["cells"]]
    assert found == [tuple(cell) for cell in BUILD.cells(FOLDER / f"{name}.py")], "make notebooks"


@pytest.mark.parametrize("name", NAMES)
def test_a_notebook_was_run_from_the_first_cell_to_the_last(name):
    code = [cell for cell in book(name)["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    outputs = [out for cell in code for out in cell["outputs"]]
    assert not [out for out in outputs if out["output_type"] == "error"]
    assert not [out for out in outputs if out.get("name") == "stderr"], "it warns"
    assert sum("image/png" in out.get("data", {}) for out in outputs) >= 1
    assert sum(out.get("name") == "stdout" for out in outputs) >= 4


@pytest.mark.parametrize("name", NAMES)
def test_a_notebook_is_small_and_says_nothing_of_the_machine_that_ran_it(name):
    text = (FOLDER / f"{name}.ipynb").read_text()
    assert len(text) < BUILD.LARGEST
    assert "/tmp/" not in text
    assert 'execution":' not in text
    assert not any("execution" in cell["metadata"] for cell in book(name)["cells"])


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.filterwarnings("ignore:FigureCanvasAgg is non-interactive:UserWarning")
def test_the_cells_run(name, tmp_path, monkeypatch, capsys):
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    monkeypatch.setenv("WSAE_NOTEBOOK_SMALL", "1")
    monkeypatch.setenv("WSAE_NOTEBOOK_MODEL", str(make_model(tmp_path / "model")))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.chdir(tmp_path)  # a notebook may go elsewhere
    names: dict[str, object] = {"__name__": "notebook"}
    figures = 0
    try:
        for number, cell in enumerate(BUILD.cells(FOLDER / f"{name}.py")):
            if cell.kind == "code":
                exec(compile(cell.text, f"{name}, cell {number}", "exec"), names)
                figures += len(plt.get_fignums())
                plt.close("all")
    finally:
        plt.close("all")
        mpl.rcdefaults()
    assert figures >= 1
    assert capsys.readouterr().out.count("\n") >= 10


def test_cells_are_text_and_code_in_the_order_of_their_source(tmp_path):
    source = tmp_path / "x.py"
    source.write_text(
        '"""Doc."""\n\n# %% [markdown]\n# # Title\n#\n# Text.\n\n# %%\na = 1\n\nb = 2\n'
    )
    assert BUILD.cells(source) == [
        BUILD.Cell("markdown", "# Title\n\nText."),
        BUILD.Cell("code", "a = 1\n\nb = 2"),
    ]
