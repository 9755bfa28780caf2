"""Flags files: what --print-config writes is read back as the same run, in YAML and JSON; mistakes name their line."""

import json
import math
import time
import types
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import numpy as np
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from wsae.acts.config import HarvestConfig, ImageHarvestConfig, ImagesConfig, LiveConfig, TextConfig
from wsae.cli import common, harvest, main, runner, table, train
from wsae.core.config import FLAG_OF, MOST_BYTES, MOST_DEPTH, Config, read_config, yaml_value
from wsae.core.errors import UserError
from wsae.core.files import read_json
from wsae.evals.config import ContextConfig, EvalConfig, InterpretConfig, LlmConfig
from wsae.sae.config import GammaConfig, JumpReLU
from wsae.train.config import MemberConfig, TrainConfig
from wsae.train.loggers import read_json_lines

COMMANDS = {command.name: runner.load(command).Flags for command in table.COMMANDS}
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
TRAPS = st.sampled_from(
    ["no", "on", "y", "~", "null", "010", "1e-3", "0x1", "1_0", "12:30", "2020-01-01", "--debug", "-1", "", " a ", "#",
     "a: b", "[1]", "{a}", "*x", "&x", "!t", "%", "@", "`", "'", '"', "\\n", "é\u2028\x85\ufeff", "\U0001f40d", "<<",
     "=",      "a\n\nb", ".inf", "-", "?", "|", ">", "yes # no", "\t"]
)  # fmt: skip


def values_of(kind: Any) -> st.SearchStrategy:
    """Return values of a flag's type."""
    if get_origin(kind) is Annotated:
        return values_of(get_args(kind)[0])
    if get_origin(kind) is Literal:
        return st.sampled_from(get_args(kind))
    if get_origin(kind) is tuple:
        return st.lists(values_of(get_args(kind)[0]), max_size=4).map(tuple)
    if type(None) in get_args(kind) or len(get_args(kind)) > 1:
        return st.one_of([values_of(inner) for inner in get_args(kind)])
    plain: dict[Any, st.SearchStrategy] = {
        type(None): st.none(),
        bool: st.booleans(),
        int: st.integers(0, 10**7),
        float: st.floats(allow_nan=False, allow_infinity=False),
        str: TEXT | TRAPS,
        Path: (TEXT | TRAPS).filter(lambda t: "\0" not in t).map(Path),
    }
    return plain[get_args(kind)[0] if get_origin(kind) else kind]


def flags_of(kind: type[Config]) -> st.SearchStrategy[Config]:
    """Return flags of a command with every value drawn, nested ones included."""
    fields = {
        name: flags_of(field.annotation) if isinstance(field.annotation, type) and issubclass(field.annotation, Config)
        else st.just(field.default) if name in (*common.NOT_IN_A_FILE, "members") else values_of(field.annotation)
        for name, field in kind.model_fields.items()
    }  # fmt: skip
    return st.fixed_dictionaries(fields).map(kind.model_validate)


@pytest.mark.parametrize("command", COMMANDS)
def test_what_print_config_writes_is_read_as_the_same_flags(
    command: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    kind, place = COMMANDS[command], tmp_path_factory.mktemp("flags")

    @settings(max_examples=10)
    @given(flags_of(kind))
    def check(wanted: Config) -> None:
        for path, text in (
            (place / "f.yaml", common.as_yaml(wanted, f"wsae {command}")),
            (place / "f.json", common.as_json(wanted)),
        ):
            path.write_text(text, encoding="utf-8")
            read = common.parse(kind, "wsae", ["--config", str(path)], "")
            assert common.as_file(read) == common.as_file(wanted), path
            known: Any = read
            assert known.common.config == path

    check()


@pytest.mark.parametrize("command", COMMANDS)
def test_the_printed_file_has_every_flag_below_its_help(command: str, capsys) -> None:
    kind = COMMANDS[command]
    needed = [p for p, f in common.leaves(kind) if f.is_required()]
    placed = "figure3" if command == "reproduce" else "bash" if command == "completion" else "x"
    words = [
        placed for p in needed if f"--{common.flag_name(p[-1])}" not in common.flag_names(kind)
    ]
    for path in needed:
        flag = f"--{common.flag_name(path[-1])}"
        words += [flag, "x"] if flag in common.flag_names(kind) else []
    assert main.main([command, *words, "--print-config"]) == 0
    text = capsys.readouterr().out
    read = yaml.safe_load(text)  # by the rules of YAML 1.1, too
    assert main.main([command, *words, "--print-config", "--json"]) == 0
    assert read | {"json": True} == json.loads(capsys.readouterr().out)
    blocks = {block.splitlines()[-1].split(":")[0]: block for block in text.split("\n\n")[1:]}
    for path, field in common.leaves(kind):
        if path[-1] not in common.NOT_IN_A_FILE:
            *comment, _ = blocks[common.key_of(path)].splitlines()
            said = " ".join(line.removeprefix("# ") for line in comment)
            assert said == " ".join((field.description or "").split())


OLD_FLAGS = {
    "train": """
        activation alpha batch-seqs batch-size d-sae dtype expansion field gamma gamma-file heldout-tokens
        hook k l0 l1 labels logger lr mesh no-pack no-skip-special no-tied no-twin normalise out pack
        quantile resume ridge robust seq-len sink-norm-ratio skip-first skip-special split subset text tied
        tokens twin wandb-mode wandb-name wandb-project
    """,
    "doctor": """
        activation alpha batch-seqs batch-size d-in d-sae dtype expansion field gamma gamma-file
        heldout-tokens hook k l0 l1 lr no-pack no-skip-special no-tied no-twin normalise out pack probe-seqs
        quantile ridge robust seq-len sink-norm-ratio skip-first skip-special split store-dtype subset text
        tied tokens twin
    """,
    "evaluate": """
        batch-size confidence draws labels n-contexts n-latents out rows source splice-tokens
    """,
    "harvest": """
        batch-seqs batch-size dtype field heldout-fraction heldout-tokens hook image-field images
        label-field limit no-pack no-skip-special on-error out pack seq-len shard-tokens sink-norm-ratio
        size skip-first skip-special split store-dtype subset text tokens workers
    """,
    "interpret": """
        agreement answers batch-size budget-requests budget-tokens concurrency confidence controls draws
        dry-run encoder endpoint force hook keep-store key-variable member min-windows model n-hard
        n-latents n-score out probabilities score simulator source surprisal-latents width
    """,
}
"""Flags that commands have always had: scripts hold them."""


@pytest.mark.parametrize("command", OLD_FLAGS)
def test_every_flag_of_old_is_still_read(command: str) -> None:
    """Each by itself, with a value that is not its default, lands in the field of its name."""
    kind = COMMANDS[command]
    fields, paths = dict(common.leaves(kind)), common.flag_names(kind)
    needed = ["x", "--out", "y"] if command in ("train", "harvest") else ["x"]
    for name in OLD_FLAGS[command].split():
        path = paths[f"--{name}"]
        field = fields[path]
        word = word_for(field.annotation, field.default)
        made = common.parse(
            kind, "wsae", [*needed, f"--{name}", *([] if word is None else [word])], ""
        )
        value = common.as_file(made)[common.key_of(path)]
        if word is None:
            assert value is not name.startswith("no-")
        elif isinstance(value, list):
            assert [str(item) for item in value] == [word]
        else:
            assert str(value) == word


def word_for(kind: Any, default: Any) -> str | None:
    """Return a word that a flag of this type takes, other than its default; None for a switch."""
    if kind is bool:
        return None
    inner = [part for part in (get_args(kind) or [kind]) if part not in (type(None), ...)]
    if get_origin(kind) is Literal:
        return next(str(choice) for choice in get_args(kind) if choice != default)
    if get_origin(inner[0]) in (Literal, Annotated, types.UnionType, Union):
        return word_for(inner[0], default)
    return {int: "7", float: "0.7"}.get(inner[0], "word")


@pytest.mark.parametrize(
    ("command", "configs"),
    [
        ("train", (TrainConfig, MemberConfig, GammaConfig, JumpReLU, LiveConfig)),
        ("doctor", (TrainConfig, MemberConfig, GammaConfig, JumpReLU, LiveConfig)),
        ("harvest", (HarvestConfig, TextConfig, ImageHarvestConfig, ImagesConfig)),
        ("evaluate", (EvalConfig,)),
        ("interpret", (InterpretConfig, ContextConfig, LlmConfig)),
    ],
)
def test_every_field_of_a_config_has_a_flag(
    command: str, configs: tuple[type[Config], ...]
) -> None:
    """Under its own name or that of FLAG_OF; the members of a family are made by --alpha and --twin."""
    elsewhere = {
        "contexts": "width",
        "rule": "gamma",
        "vector": "gamma_file",
        "kind": "activation",
        "members": "alpha",
        "label": "alpha",
        "path": "text",
        "init_from": "activation",
        "hook_out": "activation",
        "crosscoder": "activation",
    }
    keys = [path[-1] for path, _ in common.leaves(COMMANDS[command])]
    assert len(keys) == len(set(keys))
    for config in configs:
        for name in config.model_fields:
            flag = FLAG_OF.get(name, name)
            assert flag in keys or elsewhere[name] in keys, (config, name)


def test_fields_that_had_no_flag_reach_the_config() -> None:
    words = "x --out y --activation jumprelu --threshold 0.2 --bandwidth 0.3 --warmup 0.1 --decay 0.4 --kernels eager"
    more = "--dead-after 99 --log-every 3 --latent-variance-decay 0.5 --auxk 0 --k-aux 5 --encoder-scale 0.25"
    made = common.parse(train.Flags, "wsae", [*words.split(), *more.split()], "")
    cfg = train.config(made, 1000)
    assert (cfg.warmup, cfg.decay, cfg.kernels, cfg.dead_after) == (0.1, 0.4, "eager", 99)
    assert (cfg.log_every, cfg.latent_variance_decay, cfg.tokens) == (3, 0.5, 1000)
    for member in cfg.members:
        assert member.activation == JumpReLU(threshold=0.2, bandwidth=0.3)
        assert (member.auxk, member.k_aux, member.encoder_scale) == (0.0, 5, 0.25)
    for wrong, says in (
        (
            "--threshold 0.2",
            "--threshold 0.2: topk has no threshold; leave it out, or use --activation jumprelu",
        ),
        ("--warmup 2", "--warmup: Input should be less than or equal to 1 (got 2.0)"),
        ("--log-every 0", "--log-every: Input should be greater than 0 (got 0)"),
    ):
        with pytest.raises(UserError) as caught:
            train.config(
                common.parse(train.Flags, "wsae", ["x", "--out", "y", *wrong.split()], ""), 1000
            )
        assert str(caught.value) == says


@given(st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | TEXT | TRAPS,
                    lambda inner: st.lists(inner, max_size=3), max_leaves=6))  # fmt: skip
def test_a_value_written_as_yaml_is_read_back_by_ours_and_by_any_yaml(value: Any) -> None:
    text = f"key: {yaml_value(value)}\n"
    path = Path(str(WRITTEN / "v.yaml"))
    path.write_text(text, encoding="utf-8")
    assert repr(read_config(path).data["key"]) == repr(value)
    if not any(part in repr(value) for part in ("e+", "e-")):  # YAML 1.1 takes 1e-05 for a word
        assert repr(yaml.safe_load(text)["key"]) == repr(value)


WRITTEN = Path()


@pytest.fixture(autouse=True, scope="module")
def _written(tmp_path_factory: pytest.TempPathFactory) -> None:
    global WRITTEN  # noqa: PLW0603
    WRITTEN = tmp_path_factory.mktemp("values")


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("no", "no"), ("on", "on"), ("Yes", "Yes"), ("y", "y"), ("true", True), ("False", False),
        ("010", 10), ("0o10", 8), ("0x1F", 31), ("-7", -7), ("+7", 7), ("1_000", "1_000"), ("12:30", "12:30"),
        ("1e-3", 1e-3), ("1E5", 1e5), (".5", 0.5), ("5.", 5.0), ("-.inf", -math.inf), (".inf", math.inf),
        ("2020-01-01", "2020-01-01"), ("~", None), ("null", None), ("", None), ("'null'", "null"), ("=", "="),
        ("<<", "<<"), ("[1, a, [true]]", [1, "a", [True]]), ("h.6", "h.6"), ("1.2.3", "1.2.3"), ("0b1", "0b1"),
        ("1e", "1e"), ("layers.*", "layers.*"), ("{a: 1}", {"a": 1}), ("0.1e+2", 10.0), ("-", None),
    ],
)  # fmt: skip
def test_yaml_is_read_without_the_surprises_of_version_1(text: str, value: Any, tmp_path) -> None:
    path = tmp_path / "f.yaml"
    path.write_text(f"key: {text}\n" if text != "-" else "key:\n")
    found = read_config(path).data["key"]
    assert (type(found), found) == (type(value), value)


def bomb() -> str:
    lines = ["a0: &a0 [lol, lol, lol, lol, lol, lol, lol, lol, lol]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 10)]
    return "\n".join(lines)


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("f.yaml", "out: x\nd_saee: 4\n", "f.yaml:2: unknown key 'd_saee' (nearest: d_sae"),
        ("f.json", '{\n "out": "x",\n "d_saee": 4\n}', "f.json:3: unknown key 'd_saee' (nearest: d_sae"),
        ("f.yaml", "config: g.yaml\n", "f.yaml:1: unknown key 'config'"),
        ("f.yaml", "k: 3\nout: x\nk: 4\n", "f.yaml:3: key 'k' is given twice"),
        ("f.json", '{"k": 3, "k": 4}', "f.json: key 'k' is given twice"),
        ("f.yaml", "out: x\nk: many\n", "f.yaml:2: k: Input should be a valid integer"),
        ("f.yaml", "k: 2.5\n", "f.yaml:1: k: Input should be a valid integer"),
        ("f.yaml", "k: true\n", "f.yaml:1: k: Input should not be true or false"),
        ("f.yaml", "alpha: [1, true]\n", "alpha: Input should not be true or false"),
        ("f.yaml", "text: 2020\n", "f.yaml:1: text: Input should be a valid string (got 2020); quote it"),
        ("f.yaml", "activation: topp\n", "f.yaml:1: activation: Input should be 'topk', 'group_topk'"),
        ("f.yaml", bomb(), "f.yaml:1: anchors and aliases are not read here"),
        ("f.yaml", "k: *x\n", "f.yaml:1: anchors and aliases are not read here"),
        ("f.yaml", "out: x\nk: !!python/object/apply:os.system [id]\n", "f.yaml:2: tags (!...) are not read here"),
        ("f.yaml", "k: !!binary aGk=\n", "tags (!...) are not read here"),
        ("f.yaml", "k: " + "[" * 5000, f"f.yaml:1: nested deeper than {MOST_DEPTH}"),
        ("f.json", "[" * 100_000, "f.json: not JSON"),
        ("f.yaml", "k: 1\n--- \nk: 2\n", "f.yaml:2: but found another document"),
        ("f.yaml", "1: x\n", "f.yaml:1: a key is text, not '1'"),
        ("f.yaml", "k: [1\nout: x\n", "f.yaml:2: expected ',' or ']'"),
        ("f.yaml", "k: \x01\n", "f.yaml: not a flags file"),
        ("f.yaml", "- k\n", "f.yaml: a flags file is a YAML mapping, this is a list"),
        ("f.yaml", "", "f.yaml: a flags file is a YAML mapping, this is a NoneType"),
        ("f", "[1]", "f: a flags file is a JSON object, this is a list"),
        ("f.json", "k: 1", "f.json: not JSON, as a flags file of this name is"),
        ("f.yaml", "k: 1\n" * 300_000, f"f.yaml: larger than the {MOST_BYTES:,} bytes"),
        ("f.json", '{"k": ' + "9" * 5000 + "}", "f.json: not JSON"),
    ],
)  # fmt: skip
def test_a_bad_file_is_one_line_with_its_place(name, text, says, tmp_path, capsys) -> None:
    (tmp_path / name).write_text(text)
    begin = time.monotonic()
    assert main.main(["train", "x", "--out", "y", "--config", str(tmp_path / name)]) == 2
    err = capsys.readouterr().err
    assert says in err
    assert err.count("\n") == 1
    assert time.monotonic() - begin < 20


@pytest.mark.parametrize("path", ["", ".", "/dev/zero", "nowhere.yaml"])
def test_what_is_no_file_is_refused(path: str, capsys) -> None:
    assert main.main(["train", "x", "--out", "y", f"--config={path}"]) == 2
    assert capsys.readouterr().err.startswith("wsae: error: ")


@given(st.binary(max_size=200) | TEXT.map(str.encode))
def test_no_bytes_bring_it_down(data: bytes) -> None:
    for name in ("any.yaml", "any.json", "any"):
        (WRITTEN / name).write_bytes(data)
        try:
            read_config(WRITTEN / name)
        except UserError as error:
            lines = str(error).count("\n")
        else:
            lines = 0
        assert lines == 0


def test_the_command_line_wins_over_the_file_and_the_file_over_the_default(
    tmp_path, capsys
) -> None:
    file = tmp_path / "f.yaml"
    file.write_text(
        "source: here\nout: there\nk: 7\nlr: 1e-3\nalpha: 0.5\ntwin: no\nresume: on\nhook: [a, --b]\n"
    )

    def told(*words: str) -> dict[str, Any]:
        assert main.main(["train", *words, "--config", str(file), "--json", "--print-config"]) == 0
        return json.loads(capsys.readouterr().out)

    read = told()
    assert (read["source"], read["out"], read["k"], read["lr"]) == ("here", "there", [7], [1e-3])
    assert (read["alpha"], read["twin"], read["resume"], read["warmup"]) == ([0.5], False, True, 0.05)  # fmt: skip
    assert read["hook"] == ["a", "--b"]
    over = told("other", "--k", "9", "--twin", "--alpha", "1", "2")
    assert over == read | {"source": "other", "k": [9], "twin": True, "alpha": [1.0, 2.0]}
    file.write_text("k: 7\n")
    assert main.main(["train", "--config", str(file)]) == 2
    assert "missing: SOURCE, --out" in capsys.readouterr().err
    file.write_text("out: x\n")
    assert main.main(["train", "--config", str(file)]) == 2
    assert "missing: SOURCE;" in capsys.readouterr().err


def test_a_flags_file_without_a_suffix_may_be_either(tmp_path, capsys) -> None:
    for text in ('{"source": "s", "out": "o", "k": 3}', "source: s\nout: o\nk: 3\n"):
        (tmp_path / "flags").write_text(text)
        words = ["train", "--config", str(tmp_path / "flags"), "--json", "--print-config"]
        assert main.main(words) == 0
        assert json.loads(capsys.readouterr().out)["k"] == [3]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small run of three members, made by flags."""
    place = tmp_path_factory.mktemp("run")
    rng = np.random.default_rng(0)
    x = (rng.random((1500, 24)) < 0.1) * rng.random((1500, 24)) @ rng.standard_normal((24, 8))
    np.save(place / "acts.npy", x.astype(np.float32))
    words = [
        "--k",
        "2",
        "--expansion",
        "2",
        "--batch-size",
        "128",
        "--tokens",
        "1280",
        "--seed",
        "5",
    ]
    words += ["--alpha", "1", "0.5", "--lr", "1e-3", "--device", "cpu"]
    assert main.main(["train", str(place / "acts.npy"), "--out", str(place / "a"), *words]) == 0
    return place / "a"


def weights(run: Path) -> dict[str, bytes]:
    found = {str(p.relative_to(run)): p.read_bytes() for p in run.rglob("*.safetensors")}
    return found | {"metrics": (run / "metrics.jsonl").read_bytes()}


def test_a_runs_own_config_makes_the_same_weights_again(run: Path, tmp_path: Path, capsys) -> None:
    words = ["train", "--config", str(run / "config.json"), "--device", "cpu", "--out"]
    assert main.main([*words, str(tmp_path / "b")]) == 0
    assert len(weights(run)) == 4
    assert weights(tmp_path / "b") == weights(run)
    assert main.main([*words, str(tmp_path / "c"), "--seed", "6", "--tokens", "640"]) == 0
    other = read_json(tmp_path / "c" / "config.json")["train"]
    assert other == read_json(run / "config.json")["train"] | {"seed": 6, "tokens": 640}
    assert read_json_lines(tmp_path / "c" / "metrics.jsonl")[-1]["tokens"] == 640
    capsys.readouterr()
    for more, says in (
        (["--k", "3"], "--k: the SAEs of --config are taken as they are"),
        (["--text", "x"], "holds activations already; leave the flag out"),
    ):  # fmt: skip
        assert main.main([*words, str(tmp_path / "d"), *more]) == 2
        assert says in capsys.readouterr().err
    assert not (tmp_path / "d").exists()


def test_the_printed_flags_make_the_same_weights_again(run: Path, tmp_path: Path, capsys) -> None:
    words = [
        "train",
        str(run.parent / "acts.npy"),
        "--out",
        str(tmp_path / "b"),
        "--k",
        "2",
        "--expansion",
        "2",
    ]
    words += [
        "--batch-size",
        "128",
        "--tokens",
        "1280",
        "--seed",
        "5",
        "--alpha",
        "1",
        "0.5",
        "--lr",
        "1e-3",
    ]
    assert main.main([*words, "--device", "cpu", "--print-config"]) == 0
    (tmp_path / "f.yaml").write_text(capsys.readouterr().out)
    assert main.main(["train", "--config", str(tmp_path / "f.yaml")]) == 0
    assert weights(tmp_path / "b") == weights(run)


def test_a_runs_config_whose_data_are_gone_names_the_mend(
    run: Path, tmp_path: Path, capsys
) -> None:
    record = read_json(run / "config.json")
    for path, says in (
        (str(tmp_path / "gone.npy"), "gone.npy: no such store or array"),
        (None, "missing: SOURCE"),
    ):
        (tmp_path / "r.json").write_text(
            json.dumps(record | {"source": record["source"] | {"path": path}})
        )
        assert (
            main.main(["train", "--config", str(tmp_path / "r.json"), "--out", str(tmp_path / "b")])
            == 2
        )
        assert says in capsys.readouterr().err
    words = [
        "train",
        str(run.parent / "acts.npy"),
        "--config",
        str(tmp_path / "r.json"),
        "--device",
        "cpu",
    ]
    assert main.main([*words, "--out", str(tmp_path / "b")]) == 0
    assert weights(tmp_path / "b") == weights(run)
    (tmp_path / "r.json").write_text(json.dumps(record | {"train": {"members": []}}))
    assert main.main(["train", "--config", str(tmp_path / "r.json"), "--out", "x"]) == 2
    assert "r.json: train: members" in capsys.readouterr().err


def test_configs_of_any_kind_are_read_from_yaml(tmp_path: Path) -> None:
    (tmp_path / "t.yaml").write_text(
        "tokens: 100\nmembers:\n- gamma: {rule: variance, alpha: 5e-1}\n  k_aux: 3\n"
    )
    cfg = TrainConfig.load(tmp_path / "t.yaml")
    assert (cfg.tokens, cfg.members[0].gamma.alpha, cfg.members[0].k_aux) == (100, 0.5, 3)


def test_a_live_runs_record_stands_for_the_flags_that_made_it(tmp_path: Path) -> None:
    """Text, hooks, the rows that are kept and how they are mixed; what is said beside it wins."""
    words = "gpt2 --out y --text t.txt --hook layers.* --seq-len 32 --sink-norm-ratio 0 --heldout-fraction 0.3"
    more = "--shuffle-tokens 99 --stats-tokens 77 --k 3 --tokens 5000 --alpha 1 2 --seed 4"
    made = common.parse(train.Flags, "wsae", [*words.split(), *more.split()], "")
    cfg = train.config(made, None)
    text = made.live.config("gpt2", seed=4, tokens=5000)
    assert (text.heldout_fraction, text.sink_norm_ratio) == (0.3, None)
    source = {"kind": "live", "harvest": text.to_dict(), "hooks": ["layers.0", "layers.1"]}
    source["mixing"] = {"shuffle_tokens": 99, "stats_tokens": 77}
    record = {"train": cfg.to_dict(), "data": "digest", "source": source}
    (tmp_path / "r.json").write_text(json.dumps(record))
    again = ["--config", str(tmp_path / "r.json"), "--out", "y"]
    read = common.parse(train.Flags, "wsae", again, "")
    assert (read.source, read.live, read.mixing, read.common.seed) == (
        "gpt2",
        made.live.model_copy(update={"sink_norm_ratio": None}),
        made.mixing,
        4,
    )
    assert train.config(read, None) == cfg
    (tmp_path / "f.yaml").write_text(common.as_yaml(read, "wsae train"))
    printed = common.parse(train.Flags, "wsae", ["--config", str(tmp_path / "f.yaml")], "")
    assert train.config(printed, None) == cfg
    other = common.parse(train.Flags, "wsae", ["gpt2-medium", *again, "--seq-len", "64"], "")
    assert (other.source, other.live.seq_len) == ("gpt2-medium", 64)


def test_flags_of_images_that_would_do_nothing_are_refused() -> None:
    def config(*words: str) -> Any:
        made = common.parse(harvest.Flags, "wsae", ["m", "--out", "y", "--images", "p", *words], "")
        return made.vision.config(made.model, made.live)

    assert config("--size", "8", "--resize", "9").images.resize == 9
    assert config().heldout_fraction == 0.2
    assert config("--heldout-fraction", "0").heldout_fraction == 0
    for words, says in (
        (("--resize", "9"), "--resize: goes with --size"),
        (("--seq-len", "9"), "--seq-len: is for --text, not for --images"),
        (("--batch-size", "0"), "--batch-size: Input should be greater than 0 (got 0)"),
    ):
        with pytest.raises(UserError, match=says.replace("(", r"\(").replace(")", r"\)")):
            config(*words)
