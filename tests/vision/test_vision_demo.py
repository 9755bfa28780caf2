"""`wsae demo --vision`, made short: every stage, what it leaves, and what it refuses."""

import base64
import io
import json
import re
from shutil import copytree

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits

from wsae.cli.main import main
from wsae.core.artifact import read_manifest, write_manifest
from wsae.core.errors import UserError
from wsae.core.files import read_json, write_json
from wsae.report.rundata import read_run
from wsae.studies import demo
from wsae.vision.config import preset


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    out = tmp_path_factory.mktemp("demo") / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            demo, "DIGIT_SAES", demo.DIGIT_SAES.model_copy(update={"passes": 4, "d_sae": 64})
        )
        patch.setattr(
            demo,
            "pretraining",
            lambda seed: preset("tiny", images=demo.DIGITS, seed=seed, epochs=1),
        )
        assert main(["demo", "--vision", "--out", str(out), "--device", "cpu"]) == 0
        before = {p: p.stat().st_mtime_ns for p in out.rglob("*.safetensors")}
        assert main(["demo", "--vision", "--out", str(out), "--device", "cpu", "--json"]) == 0
    assert before == {p: p.stat().st_mtime_ns for p in out.rglob("*.safetensors")}, "nothing again"
    return out


def test_the_report_shows_the_very_images_on_which_a_latent_fires(made):
    page = (made / "report.html").read_text(encoding="utf-8")
    packed = json.loads(re.search(r'id="contexts">(.*?)</script>', page, re.S)[1])
    digits = load_digits()
    ((hook, members),) = packed["hooks"]
    assert (hook, [name for name, _ in members]) == (
        "pooler",
        ["plain", "consistency-a1", "variance-a1"],
    )
    shown = [c for _, latents in members for latent in latents for c in latent[5]]
    assert len(shown) > 100
    for tokens, _, image, (_, act) in shown:
        assert packed["tokens"][tokens[0]] == str(digits.target[image])
        assert act > 0
        picture = Image.open(io.BytesIO(base64.b64decode(packed["images"][str(image)])))
        wanted = np.round(digits.images[image] * (255 / 16)).astype(np.uint8)
        assert np.array_equal(np.asarray(picture), wanted)
    assert len(packed["images"]) == len({image for _, _, image, _ in shown})
    assert "img-src data:" in page
    assert "held-out images" in page
    assert "Are the latents about one class?" in page


def test_class_scores_stand_beside_the_latents_and_in_the_table(made):
    run = read_run(made / "run")
    scored = run.classes["hooks"]["pooler"]
    assert set(scored["controls"]) == {
        "control-dimensions", "control-pca", "control-random-sae", "control-shuffled",
    }  # fmt: skip
    latents = run.contexts["pooler"]["plain"]
    values = run.arrays["pooler|plain|density"]
    assert [e["density"] for e in latents] == [values[e["latent"]] for e in latents]
    known = [e["scores"]["consistency_top"] for e in latents if e["scores"]["consistency_top"]]
    assert known
    assert all(0.1 <= value <= 1 for value in known)


@pytest.mark.parametrize("data", ["javascript:alert(1)", 'AAAA" onerror="x', "<b>", "A A", ""])
def test_a_thumbnail_that_is_no_picture_in_base64_is_refused(made, tmp_path, data):
    run = copytree(made / "run", tmp_path / "run")
    place = run / "evaluation"
    old = read_manifest(place, "evaluation", verify=False)
    found = read_json(place / "thumbnails.json")
    write_json(place / "thumbnails.json", {**found, "7": data})
    write_manifest(place, "evaluation", old.config, list(old.files), inputs=old.inputs)
    with pytest.raises(
        UserError, match=r"thumbnails\.json: not of the form that this wsae writes \(7 "
    ):
        read_run(run)


@pytest.mark.parametrize("words", [["--model", "gpt2"], ["--alpha", "2"], ["--hook", "layers.3"]])
def test_flags_of_the_demo_on_text_are_refused(words, tmp_path, capsys):
    assert main(["demo", "--vision", "--out", str(tmp_path / "o"), *words]) == 2
    said = capsys.readouterr().err
    assert f"{words[0]}: is for the demo on text, not for --vision" in said
    assert not (tmp_path / "o").exists()
