"""One SAE alone, of ours or imported, is a run of one member: every command takes it, or says what is missing."""

import json
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from acts_models import make_model, make_text
from test_interop_roundtrip import make, same_bits

import wsae
from wsae.acts.source import MatrixRows
from wsae.cli.main import main
from wsae.evals.config import EvalConfig
from wsae.evals.measure import Survey
from wsae.evals.run import evaluate_run
from wsae.interop import Provenance, load
from wsae.interop.saes import choose, open_run

FIXTURES = Path(__file__).parents[1] / "fixtures"
STORE = FIXTURES / "before-fold" / "store"
HOOK = "layers.1"
QUICK = ["--draws", "20", "--n-latents", "0"]


def failed(capsys, words: list[str]) -> str:
    assert main(words) == 2, words
    error = capsys.readouterr().err
    assert error.count("\n") == 1, error
    return error


def told(capsys, words: list[str]) -> dict:
    assert main([*words, "--json"]) == 0, capsys.readouterr().err
    return json.loads(capsys.readouterr().out)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("WSAE_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def acts(tmp_path) -> Path:
    np.save(tmp_path / "acts.npy", np.random.default_rng(0).normal(size=(300, 6)).astype("float32"))
    return tmp_path / "acts.npy"


@pytest.fixture
def theirs(tmp_path, capsys) -> Path:
    """SAELens' own folder, imported."""
    place = tmp_path / "theirs"
    told(capsys, ["import", str(FIXTURES / "interop/saelens-topk"), "--out", str(place)])
    return place


def test_an_sae_in_memory_becomes_a_run_that_says_only_what_is_known(tmp_path):
    sae = make("relu", d_in=6)
    run = wsae.Run.of_sae(sae, tmp_path / "mine", Provenance(hook=HOOK, model="m"))
    assert run.single
    assert run.finished
    assert run.members == {HOOK: ["sae"]}
    assert same_bits(run.saes[HOOK]["sae"], sae)
    assert run.config.tokens is None
    assert run.config.names() == ["sae"]
    assert (run.config.sae, run.provenance.model) == (sae.cfg, "m")
    assert run.gamma[HOOK]["sae"].rule is None  # not recorded
    assert not run.has("evaluation")
    assert run.metrics == {}
    assert run.source == {}
    with pytest.raises(wsae.UserError, match="run: wsae evaluate .*mine --source DATA"):
        _ = run.evaluation
    with pytest.raises(wsae.UserError, match="--force"):
        wsae.Run.of_sae(sae, tmp_path / "mine")
    with pytest.raises(wsae.UserError, match="read by wsae import"):
        wsae.Run(FIXTURES / "interop/saelens-topk")


def test_an_imported_folder_opens_as_a_run(theirs):
    run = wsae.Run(theirs)
    assert run.members == {"blocks.3.hook_resid_post": ["sae"]}
    assert (
        run.gamma["blocks.3.hook_resid_post"]["sae"].rule == "none"
    )  # another tool weighs nothing
    assert (run.provenance.model, run.provenance.context) == ("tiny", 64)
    assert run.config.tokens == run.provenance.tokens


def test_every_command_says_in_one_line_what_an_sae_alone_lacks(theirs, capsys):
    place = str(theirs)
    for words in (["report", place], ["compare", place], ["serve", place, "--index-only"]):
        assert f"has not been evaluated; run: wsae evaluate {place} --source DATA" in failed(
            capsys, words
        )
    for words in (["evaluate", place], ["interpret", place]):
        said = failed(capsys, [*words, "--device", "cpu"])
        assert "--source" in said
        assert said.endswith(f"wsae evaluate {place} --text FILE\n")  # its files say model and hook


def test_an_imported_sae_is_measured_shown_compared_and_given_away(theirs, acts, tmp_path, capsys):
    other = tmp_path / "other"
    told(capsys, ["import", str(FIXTURES / "interop/dl-topk"), "--out", str(other)])
    for place in (theirs, other):
        found = told(capsys, ["evaluate", str(place), "--source", str(acts), *QUICK])
        assert found["sae"] == str(place)
        assert set(found["hooks"]["acts"]["members"]) == {"sae", "random"}
    value = found["hooks"]["acts"]["members"]["sae"]["metrics"]["fvu"]["value"]
    run = wsae.Run(other)
    assert run.evaluation.hooks["acts"].members["sae"].metrics["fvu"].value == value
    assert run.members == {"acts": ["sae"]}
    assert run.source["path"] == str(acts)
    again = told(capsys, ["evaluate", str(other), *QUICK])  # on the same data
    assert again["hooks"]["acts"]["members"]["sae"]["metrics"]["fvu"]["value"] == value
    page = Path(told(capsys, ["report", str(other)])["report"]).read_text()
    head = page.split("<main>")[0]
    assert "One sparse autoencoder" in head
    assert "plain twin" not in head
    assert "No training metrics" not in head
    assert "not a finished" not in page
    told(capsys, ["serve", str(theirs), "--index-only", "--contexts", "0"])
    lines = told(capsys, ["compare", str(theirs), str(other), "--draws", "20"])["hooks"]["acts"]
    assert {(line["a"], line["b"]) for line in lines} == {("other:sae", "theirs:sae")}
    assert choose(other)[0].about.metrics["fvu"]["value"] == value
    told(capsys, ["export", str(other), "--out", str(tmp_path / "out")])
    assert same_bits(load(tmp_path / "out").sae, load(other).sae)


def test_what_was_measured_of_another_sae_in_the_same_place_is_not_shown(theirs, acts, capsys):
    told(capsys, ["evaluate", str(theirs), "--source", str(acts), *QUICK])
    standard = str(FIXTURES / "interop/saelens-standard")
    told(capsys, ["import", standard, "--out", str(theirs), "--force"])
    assert not wsae.Run(theirs).has("evaluation")
    assert "has not been evaluated" in failed(capsys, ["report", str(theirs)])


def test_an_sae_alone_is_measured_and_interpreted_on_text(tmp_path, capsys):
    """Also where the model behind the text is not here: nothing is spliced then, and that is said."""
    place = tmp_path / "mine"
    wsae.Run.of_sae(make("topk", d_in=16, groups=8), place, Provenance(hook=HOOK))
    words = ["--source", str(STORE), "--device", "cpu", "--draws", "20"]
    found = told(capsys, ["evaluate", str(place), *words, "--n-latents", "4"])
    assert any("not spliced into the model" in note for note in found["notes"])
    assert wsae.Run(place).contexts[HOOK]["sae"]
    least = ["--n-latents", "2", "--score", "embedding"]
    interpreted = told(capsys, ["interpret", str(place), *words, *least])
    assert set(interpreted["hooks"][HOOK]["members"]) == {"sae"}
    assert told(capsys, ["interpret", str(place), "--device", "cpu", "--draws", "20", *least])
    told(capsys, ["serve", str(place), "--index-only", "--contexts", "4"])
    assert Path(told(capsys, ["report", str(place)])["report"]).is_file()


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """A tiny model, and a text beside it."""
    place = tmp_path_factory.mktemp("model")
    make_text(place / "text.jsonl", documents=120)
    return make_model(place / "model")


def test_a_text_is_read_by_the_model_that_the_files_or_the_flags_name(model, tmp_path, capsys):
    """The files know TransformerLens' name of the place; what is measured is what a store of it gives."""
    known, open_ends = tmp_path / "known", tmp_path / "open"
    sae = make("topk", d_in=16, groups=8)
    about = Provenance(model=str(model), hook="blocks.1.hook_resid_post", context=32)
    wsae.Run.of_sae(sae, known, about)
    wsae.Run.of_sae(sae, open_ends)
    text = ["--text", str(model.parent / "text.jsonl")]
    words = ["evaluate", "--device", "cpu", "--draws", "20", "--n-latents", "4"]
    found = told(capsys, [*words, str(known), *text])
    reading = ["--seq-len", "32", "--hook", "layers.1"]
    lines = [json.loads(line) for line in (model.parent / "text.jsonl").read_text().splitlines()]
    other = tmp_path / "other.jsonl"
    other.write_text("".join(json.dumps({"body": line["text"]}) + "\n" for line in lines))
    renamed = ["--text", str(other), "--field", "body", "--model", str(model), *reading]
    again = told(capsys, [*words, str(open_ends), *renamed])
    assert found["hooks"] == again["hooks"]
    unknown, *others = again["notes"]
    assert "nothing says what the SAE was trained on" in unknown
    assert found["notes"] == others
    store = ["--out", str(tmp_path / "store"), "--tokens", "200", *reading, *text]
    assert main(["harvest", str(model), "--device", "cpu", *store]) == 0
    capsys.readouterr()
    stored = told(capsys, [*words, str(known), "--source", str(tmp_path / "store")])
    assert stored["hooks"] == found["hooks"]
    assert wsae.Run(known).contexts["layers.1"]["sae"]
    told(capsys, [*words, str(open_ends)])  # the text is remembered
    report = ["report", str(open_ends), *renamed, "--device", "cpu"]
    evaluated = open_ends / "evaluation" / "manifest.json"
    for changed in (False, True):
        before = evaluated.read_bytes()
        if changed:
            other.write_text(other.read_text().replace("the", "and"))
        told(capsys, report)
        assert (evaluated.read_bytes() == before) == (not changed)
    fresh = tmp_path / "fresh"
    wsae.Run.of_sae(sae, fresh, about)
    there = [str(fresh), *text, "--device", "cpu"]
    told(capsys, ["report", *there])  # evaluates it first
    assert wsae.Run(fresh).evaluation_record["hooks"].keys() == {"layers.1"}
    probed = told(capsys, ["probe", *there, "--draws", "20"])
    assert set(probed["tokens"]["hooks"]["layers.1"]["members"]) == {"sae"}


def test_interpreting_on_a_text_says_which_flag_is_missing(model, tmp_path, capsys):
    """`--model` is the judge there."""
    wsae.Run.of_sae(make("topk", d_in=16, groups=8), tmp_path / "mine")
    words = ["interpret", str(tmp_path / "mine"), "--device", "cpu"]
    text = ["--text", str(model.parent / "text.jsonl")]
    assert "add --text-model MODEL" in failed(capsys, [*words, *text])
    assert "add --hook HOOK" in failed(capsys, [*words, *text, "--text-model", str(model)])
    assert "--seq-len: goes with --text" in failed(capsys, [*words, "--seq-len", "9"])
    two = ["--text-model", str(model), "--hook", "layers.1", "layers.0"]
    assert "has one hook" in failed(capsys, [*words, *text, *two])


PLACE = ["--model", "MODEL", "--hook", "layers.1"]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--text", "TEXT"], "do not say its model; add --model MODEL"),
        (["--text", "TEXT", "--model", "MODEL"], "do not say its hook; add --hook HOOK"),
        (
            ["--text", "TEXT", "--model", "MODEL", "--hook", "layers.*"],
            "means 3 modules; name one",
        ),
        (["--text", "TEXT", "--model", "MODEL", "--hook", "layers.9"], "no such module"),
        (["--text", "gone.txt", "--model", "MODEL", "--hook", "layers.1"], "gone.txt"),
        (["--text", "TEXT", "--source", "x.npy"], "give one of them"),
        (["--model", "MODEL"], "--model: goes with --text"),
        (["--seq-len", "9"], "--seq-len: goes with --text"),
        (["--field", "body"], "--field: goes with --text"),
        (["--text", "TEXT", *PLACE, "--field", "body"], "body"),
        (["--text", "TEXT", *PLACE, "--roles", "assistant"], "has no chat template"),
        (["--source", "gone.npy"], "gone.npy: no such"),
        ([], "--text FILE --model MODEL --hook HOOK"),
    ],
)
def test_what_one_sae_cannot_be_measured_on_is_one_line(words, says, model, tmp_path, capsys):
    wsae.Run.of_sae(make("topk", d_in=16, groups=8), tmp_path / "mine")
    real = {"TEXT": str(model.parent / "text.jsonl"), "MODEL": str(model)}
    given = [real.get(word, word) for word in words]
    said = failed(capsys, ["evaluate", str(tmp_path / "mine"), "--device", "cpu", *given])
    assert says in said
    assert not (tmp_path / "mine" / "evaluation").exists()


def test_a_text_is_refused_for_a_run(capsys):
    run = ["evaluate", str(FIXTURES / "before-fold/run"), "--text", "builtin"]
    assert "is for one SAE alone" in failed(capsys, run)


def test_classes_are_scored_for_one_sae_too(tmp_path, acts, capsys):
    np.save(tmp_path / "y.npy", np.arange(300) % 3)
    wsae.Run.of_sae(make("relu", d_in=6), tmp_path / "mine")
    data = ["--source", str(acts), "--labels", str(tmp_path / "y.npy"), *QUICK]
    found = told(capsys, ["evaluate", str(tmp_path / "mine"), *data])
    assert set(found["classes"]["hooks"]["acts"]["members"]) == {"sae"}
    assert set(wsae.Run(tmp_path / "mine").class_record["hooks"]["acts"]["members"]) == {"sae"}
    assert any("nothing says what the SAE was trained on" in note for note in found["notes"])
    assert Path(told(capsys, ["report", str(tmp_path / "mine")])["report"]).is_file()
    for rows, left in ((acts, True), (tmp_path / "others.npy", False)):  # theirs, and of others
        np.save(tmp_path / "others.npy", np.load(acts)[::2])
        told(capsys, ["evaluate", str(tmp_path / "mine"), "--source", str(rows), *QUICK])
        assert wsae.Run(tmp_path / "mine").has("classes") is left


@pytest.fixture
def heard():
    """Ctrl-C is heard, though a shell's background job, as the suite may be, ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("heard")
def test_ctrl_c_leaves_what_was_measured_before(tmp_path, acts, capsys, monkeypatch):
    place = tmp_path / "mine"
    wsae.Run.of_sae(make("relu", d_in=6), place)
    words = ["evaluate", str(place), "--source", str(acts), *QUICK]

    def stopped() -> str:
        assert main(words) == 130
        return capsys.readouterr().err.splitlines()[-1]

    def interrupt(*_: object) -> None:
        signal.raise_signal(signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(Survey, "update", interrupt)
        assert (
            stopped() == "wsae: interrupted; nothing was written; the same command measures again"
        )
    told(capsys, words)
    before = wsae.Run(place).evaluation_record
    monkeypatch.setattr(Survey, "update", interrupt)
    kept = f"{place} keeps its evaluation"
    assert stopped() == f"wsae: interrupted; {kept}; the same command measures again"
    assert wsae.Run(place).evaluation_record == before


def test_another_tools_folder_serves_every_command_and_is_left_alone(tmp_path, acts, capsys):
    folder = Path(shutil.copytree(FIXTURES / "interop/saelens-topk", tmp_path / "folder"))
    before = sorted(p.name for p in folder.iterdir())
    np.save(tmp_path / "y.npy", np.arange(300) % 3)
    data = ["--source", str(acts), "--labels", str(tmp_path / "y.npy"), *QUICK]
    found = told(capsys, ["evaluate", str(folder), *data])
    assert set(found["hooks"]["acts"]["members"]) == {"sae", "random"}
    assert "classes" in found
    kept = Path(found["kept"])
    assert wsae.Run(kept).has("evaluation")
    assert Path(told(capsys, ["report", str(folder)])["report"]).parent == kept
    told(capsys, ["serve", str(folder), "--index-only", "--contexts", "0"])
    told(capsys, ["compare", str(folder)])
    assert choose(folder, hook="layers.3")[0].about.hook == "blocks.3.hook_resid_post"
    with pytest.raises(wsae.UserError, match=r"single SAE of blocks\.3"):
        choose(folder, hook="layers.4")
    told(capsys, ["export", str(folder), "--format", "sparsify", "--out", str(tmp_path / "out")])
    assert same_bits(load(tmp_path / "out").sae, load(folder).sae)
    assert sorted(p.name for p in folder.iterdir()) == before


def test_a_member_of_a_run_is_a_run_of_its_own(tmp_path):
    run = Path(shutil.copytree(FIXTURES / "before-fold/run", tmp_path / "run"))
    alone = wsae.Run(run / "members" / HOOK / "plain")
    (sae,) = alone.saes["activations"].values()
    assert torch.equal(sae.W_dec, wsae.Run(run).saes[HOOK]["plain"].W_dec)


def test_whatever_import_reads_opens_as_a_run_that_is_found_again(tmp_path, acts):
    folder = Path(shutil.copytree(FIXTURES / "interop/saelens-topk", tmp_path / "theirs"))
    run = open_run(folder)
    assert same_bits(run.saes["blocks.3.hook_resid_post"]["sae"], load(folder).sae)
    assert sorted(p.name for p in folder.iterdir()) == [
        "cfg.json",
        "expected.safetensors",
        "sae_weights.safetensors",
    ]
    assert open_run(folder / "cfg.json").saes.keys() == run.saes.keys()
    evaluate_run(run.path, MatrixRows(acts), EvalConfig(draws=20, n_latents=0))
    assert open_run(folder).has("evaluation")
    config = json.loads((folder / "cfg.json").read_text())
    (folder / "cfg.json").write_text(json.dumps(config | {"k": config["k"] + 1}))
    assert not open_run(folder).has("evaluation")  # another SAE
    assert open_run(run.path).path == run.path
    assert open_run(FIXTURES / "before-fold/run").members.keys() == {HOOK}


def test_what_is_neither_a_run_nor_an_sae_is_one_line(tmp_path):
    cut = Path(shutil.copytree(FIXTURES / "interop/saelens-topk", tmp_path / "cut"))
    weights = cut / "sae_weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:-50])
    (tmp_path / "empty").mkdir()
    for place, match in (
        (cut, "sae_weights"),
        ("empty", "holds no SAE"),
        ("gone", "no such run directory"),
    ):
        with pytest.raises(wsae.UserError, match=match) as caught:
            open_run(tmp_path / place)
        assert "\n" not in str(caught.value)


def test_one_sae_is_compared_with_every_member_of_a_run(tmp_path, capsys):
    """Also where the run knows its hook by another name."""
    run = Path(shutil.copytree(FIXTURES / "before-fold/run", tmp_path / "run"))
    place, data = tmp_path / "mine", ["--source", str(STORE), "--device", "cpu", *QUICK]
    (plain, *_) = wsae.Run(run).saes[HOOK].values()
    wsae.Run.of_sae(plain, place, Provenance(hook="blocks.1.hook_resid_post"))
    for target in (place, run):
        told(capsys, ["evaluate", str(target), *data, "--splice-tokens", "0"])
    lines = told(capsys, ["compare", str(run), str(place), "--draws", "20"])["hooks"][HOOK]
    mine = [line for line in lines if line["a"] == "mine:sae"]
    assert {line["b"] for line in mine} == {"run:plain", "run:variance-a1"}
    fvu = {line["b"]: line["difference"] for line in mine if line["metric"] == "fvu"}
    assert fvu["run:plain"] == 0
    assert fvu["run:variance-a1"] != 0
