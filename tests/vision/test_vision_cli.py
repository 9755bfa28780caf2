"""`wsae pretrain`: flags, the table at the end, and how it goes on."""

import json
from pathlib import Path

import numpy as np
import pytest

from wsae.cli import main
from wsae.cli.pretrain import Flags, config
from wsae.cli.runner import how_to_go_on


def write_images(place: Path, n: int = 70, labels: bool = True) -> Path:
    rng = np.random.default_rng(0)
    classes = np.arange(n) % 2
    x = rng.integers(0, 100, (n, 8, 8)) + 100 * classes[:, None, None]
    found = {"images": x.astype(np.uint8), "names": np.array(["dark", "bright"])}
    np.savez(place, **found, **({"labels": classes} if labels else {}))
    return place


def test_flags_change_the_preset_and_leave_the_rest() -> None:
    flags = Flags(images="x", out=Path("y"), preset="cifar", method="simclr", epochs=7, limit=90)
    cfg = config(flags)
    assert (cfg.epochs, cfg.limit, cfg.batch_size, cfg.positivity) == (7, 90, 256, "none")
    assert (cfg.images.path, cfg.images.size, cfg.size) == ("x", 32, 32)
    assert config(Flags(images="x", out=Path("y"), batch_size=64)).lr == pytest.approx(0.1)


def test_the_command_trains_says_what_it_found_and_returns_a_finished_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["pretrain", str(write_images(tmp_path / "x.npz")), "--out", str(tmp_path / "run")]
    words += ["--preset", "tiny", "--epochs", "1", "--batch-size", "16", "--device", "cpu"]
    assert main.main([*words, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["run"] == str(tmp_path / "run")
    assert result["probes"]["raw_pixels"]["accuracy"] == 1.0
    assert main.main(words) == 0
    text = capsys.readouterr().out
    assert "the same on raw pixels" in text
    assert "100.00 %" in text
    assert f"{result['loss']:.4g} after {result['steps']} steps" in text


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["x.npz", "--batch-size", "64"], "are fewer than a batch of 64; use --batch-size 5"),
        (["x.npz", "--epochs", "0"], "epochs"),
        (["x.npz", "--method", "moco"], "--method: 'moco' is not one of"),
        (["nowhere.npz"], "nowhere.npz: no such file"),
    ],
)
def test_bad_input_is_one_line(
    words: list[str], says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    write_images(Path("x.npz"))
    assert main.main(["pretrain", *words, "--out", "run", "--preset", "tiny"]) == 2
    error = capsys.readouterr().err
    assert says in error
    assert error.count("\n") == 1
    assert not Path("run").exists()


def test_images_without_labels_are_trained_on_and_it_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place = write_images(tmp_path / "x.npz", labels=False)
    words = ["--preset", "tiny", "--epochs", "1", "--batch-size", "16"]
    assert main.main(["pretrain", str(place), "--out", str(tmp_path / "run"), *words]) == 0
    assert "was not measured" in capsys.readouterr().out


def test_an_interrupted_command_says_how_to_go_on(tmp_path: Path) -> None:
    words = ["x", "--out", str(tmp_path)]
    said = how_to_go_on("pretrain", tmp_path, words, KeyboardInterrupt())
    assert "no checkpoint yet" in said
    (tmp_path / "checkpoints").mkdir()
    stopped = KeyboardInterrupt("stopped after step 3 of 9")
    said = how_to_go_on("pretrain", tmp_path, words, stopped)
    assert said.endswith(f"wsae pretrain x --out {tmp_path} --resume")
    assert said.startswith("stopped after step 3 of 9; ")
