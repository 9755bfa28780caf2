"""The command line's manners: help, exit codes, one line for bad input, JSON alone on stdout."""

import contextlib
import json
import os
import re
import resource
import shlex
import signal
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import numpy as np
import pytest
import yaml

from wsae.cli import common, main, runner, table, train
from wsae.cli import live as plan
from wsae.core.errors import UserError
from wsae.core.files import finite

SAYS_ONE_LINE = re.compile(r"wsae: error: [^\n]+\n\Z")


def wsae(*words: str, cwd: Path | None = None, **options) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "wsae.cli", *words],
        cwd=cwd, capture_output=True, text=True, timeout=100, check=False, **options,
    )  # fmt: skip


def write_array(place: Path) -> Path:
    rng = np.random.default_rng(0)
    features = (rng.random((1500, 24)) < 0.1) * rng.random((1500, 24))
    np.save(place / "acts.npy", (features @ rng.standard_normal((24, 8))).astype(np.float32))
    return place / "acts.npy"


@pytest.fixture
def array(tmp_path: Path) -> Path:
    return write_array(tmp_path)


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> tuple[Path, subprocess.CompletedProcess[str]]:
    """A run made by the command in a process of its own, and what it said."""
    array = write_array(tmp_path_factory.mktemp("trained"))
    words = ["--k", "2", "--expansion", "2", "--batch-size", "128", "--tokens", "640", "--json"]
    words += ["--alpha", "1"]
    return array, wsae("train", str(array), "--out", str(array.parent / "run"), *words)


def test_help_lists_every_command_and_its_first_example(capsys):
    assert main.main(["--help"]) == 0
    text = capsys.readouterr().out
    for command in table.COMMANDS:
        assert f"  {command.name} " in text
        assert command.summary in text
        assert command.examples[0] in text
    assert max(map(len, text.splitlines())) <= 100


def test_no_words_at_all_show_the_help(capsys):
    assert main.main([]) == 0
    assert "usage: wsae COMMAND" in capsys.readouterr().out


def test_version_is_the_packages(capsys):
    assert main.main(["--version"]) == 0
    from wsae.core import __version__

    assert capsys.readouterr().out == f"wsae {__version__}\n"


@pytest.mark.parametrize("command", table.names())
def test_each_commands_help_shows_its_examples_and_the_common_flags(command, capsys):
    assert main.main([command, "--help"]) == 0
    text = capsys.readouterr().out
    found = table.find(command)
    assert found is not None
    for example in found.examples:
        assert example in text
    for flag in ("--json", "--seed", "--device", "--out", "--debug", "--config"):
        assert re.search(rf"{flag}\b", text), f"{command} lacks {flag}"


@pytest.mark.parametrize("example", [e for c in table.COMMANDS for e in c.examples])
def test_the_flags_of_every_example_in_the_help_are_real(example, capsys):
    _, command, *words = shlex.split(example)
    assert main.main([command, *words, "--print-config"]) == 0
    assert yaml.safe_load(capsys.readouterr().out)


@pytest.mark.parametrize("flag", ["--out", "--lm-eval"])
@pytest.mark.parametrize(
    "command",
    ["attribute x --prompt a", "compare x", "evaluate x", "interpret x", "probe x", "releases", "steer x --prompt a"],
)  # fmt: skip
def test_where_a_result_cannot_be_written_is_said_before_the_work(command, flag, tmp_path, capsys):
    """Before the run is even opened; nothing is left behind."""
    if flag == "--lm-eval" and not command.startswith("steer"):
        return
    (tmp_path / "file").write_text("mine")
    for place, says in (
        (tmp_path, "a directory is in the way"),
        (tmp_path / "file" / "x.json", "a file is in the way"),
        (tmp_path / ("x" * 250), "a longer name than this system has"),
    ):
        assert main.main([*command.split(), flag, str(place)]) == 2
        out, err = capsys.readouterr()
        assert out == ""
        assert SAYS_ONE_LINE.match(err), err
        assert says in err
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["traim"], "no command 'traim' (nearest: train, pretrain"),
        (["--json", "train"], "put the command first"),
        (["train", "x", "--out", "y", "--kk", "3"], "unknown flag --kk (nearest: --k"),
        (["train", "x", "--out", "y", "--d_saee", "3"], "nearest: --d-sae"),
        (["train", "x", "--out", "y", "--epochs", "3"], "unknown flag --epochs; see"),
        (["train", "x", "--out", "y", "--k", "abc"], "--k: 'abc' is not a whole number"),
        (["train", "x", "--out", "y", "--k=2.5"], "--k: '2.5' is not a whole number"),
        (["train", "x", "--out", "y", "--alpha", "much"], "--alpha: 'much' is not a number"),
        (["train", "x", "--out", "y", "--activation", "tok"], "--activation: 'tok' is not one of"),
        (["train", "x"], "missing: --out"),
        (["train"], "missing: SOURCE, --out"),
        (["train", "x", "y", "--out", "z"], "left over: y"),
        (["train", "x", "--out", "y", "--k"], "no value for '--k'"),
        (["train", "x", "--out", "y", "--crosscoder"], "no value for '--crosscoder'"),
        (["train", "x", "--out", "y", "--hook", "a", "--hook=b"], "twice; give all its values after one: --hook A B"),
        (["interpret", "x", "--member", "a", "--member", "b"], "--member is given twice"),
        (["train", "x", "--out", "y", "--k", "0"], "greater than 0 (got 0)"),
        (["train", "x", "--out", "y", "--k", "3", "--activation", "relu"], "relu has no k"),
        (["train", "nowhere.npy", "--out", "y"], "nowhere.npy: no such store or array"),
        (["train", "x", "--out", "y", "--alpha", "nan"], "alpha"),
        (["train", "x", "--out", "y", "--gamma", "vector"], "vector"),
        (["train", "x", "--out", "y", "--gamma", "none", "--robust", "drop"], "use --gamma variance --alpha 0"),
        (["train", "x", "--out", "y", "--gamma", "vector", "--gamma-file", "g.npy"], "g.npy: no such file"),
        (["train", "gpt2", "--out", "y", "--text", "builtin"], "no --hook"),
        (["harvest", "gpt2", "--hook", "h.1", "--out", "y"], "no --text"),
        (["report", "nowhere"], "nowhere"),
        (["evaluate", "nowhere"], "nowhere: no such run directory"),
        (["compare", "nowhere"], "nowhere"),
        (["train", "--config", "nowhere.json"], "nowhere.json: no such file"),
    ],
)  # fmt: skip
def test_bad_input_is_one_line_and_exit_code_2(words, says, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main.main(words) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert SAYS_ONE_LINE.match(err), err
    assert says in err
    assert list(tmp_path.iterdir()) == [], "bad input must leave nothing behind"


def test_an_unknown_device_is_refused_before_anything_is_written(array, capsys):
    out = array.parent / "run"
    assert main.main(["train", str(array), "--out", str(out), "--device", "cuda:77"]) == 2
    assert "--device cuda:77: not on this machine" in capsys.readouterr().err
    assert not out.exists()


def test_debug_shows_the_traceback_and_the_same_last_line(capsys):
    assert main.main(["report", "nowhere", "--debug"]) == 2
    err = capsys.readouterr().err
    assert err.startswith("Traceback")
    assert err.splitlines()[-1].startswith("wsae: error: ")


def test_an_unexpected_error_is_named_on_one_line_with_exit_code_1(capsys):
    def broken() -> int:
        raise KeyError("inside\nout")

    assert main._guarded(broken, debug=False) == 1
    err = capsys.readouterr().err
    assert SAYS_ONE_LINE.match(err)
    assert "KeyError" in err
    assert "--debug" in err


def test_running_out_of_memory_names_the_mend(capsys):
    def broken() -> int:
        raise MemoryError

    assert main._guarded(broken, debug=False) == 2
    assert "lower --batch-size" in capsys.readouterr().err


def test_a_missing_file_that_only_the_system_noticed_is_bad_input(tmp_path, capsys):
    assert main._guarded(lambda: len((tmp_path / "gone").read_bytes()), debug=False) == 2
    assert "no such file" in capsys.readouterr().err


def test_several_alphas_make_one_member_each_beside_one_plain_twin():
    made = plan.PlanFlags(alpha=(1.0, 0.5), k=4, d_sae=16).config(rows=1000, seed=3)
    assert made.names() == ["plain", "variance-a1", "variance-a0.5"]
    assert made.tokens == 1000
    assert made.seed == 3
    assert {m.activation.kind for m in made.members} == {"topk"}
    alone = plan.PlanFlags(alpha=(1.0, 0.5), twin=False).config(None, 0)
    assert alone.names() == ["variance-a1", "variance-a0.5"]
    assert alone.tokens == plan.TOKENS


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        ({"k": 4, "activation": ("relu", "jumprelu")},
         "--k 4: relu and jumprelu have no k; leave it out, or use --activation topk"),
        ({"l0": (0.1, 1.0)}, "--l0 0.1 1.0: topk has no l0; leave it out, or use --activation jumprelu"),
    ],
)  # fmt: skip
def test_a_grid_is_refused_where_no_kind_has_what_is_asked(flags: dict, told: str) -> None:
    with pytest.raises(UserError, match=re.escape(told)):
        plan.PlanFlags(**flags).config(1000, 0)


def test_a_gamma_vector_is_read_from_a_file(tmp_path):
    np.save(tmp_path / "g.npy", np.array([1.0, 2.0]))
    made = plan.PlanFlags(gamma="vector", gamma_file=tmp_path / "g.npy").config(None, 0)
    assert made.members[-1].gamma.vector == (1.0, 2.0)
    np.save(tmp_path / "g.npy", np.ones((2, 2)))
    with pytest.raises(UserError, match="one number per input dimension"):
        plan.PlanFlags(gamma="vector", gamma_file=tmp_path / "g.npy").config(None, 0)


def test_json_has_no_words_for_nan():
    assert finite({"a": [float("nan"), 1.5], "b": (float("inf"), "x")}) == {
        "a": [None, 1.5],
        "b": [None, "x"],
    }


def test_every_flag_of_a_nested_config_is_known_once():
    names = [path for path, _ in common.leaves(train.Flags)]
    keys = [common.key_of(path) for path in names]
    assert len(keys) == len(set(keys))
    known = common.flag_names(train.Flags)
    assert {"--d-sae", "--no-twin", "--json", "--resume", "--text"} <= set(known)
    assert "--no-resume" not in known
    assert "--source" not in known


def test_a_closed_pipe_is_no_error():
    done = subprocess.run(
        ["bash", "-c", f"{sys.executable} -m wsae.cli --help | head -1; echo ${{PIPESTATUS[0]}}"],
        capture_output=True, text=True, timeout=60, check=True,
    )  # fmt: skip
    assert done.stdout.splitlines()[-1] in ("0", "141")
    assert done.stderr == ""


def test_with_json_stdout_holds_the_result_and_nothing_else(trained):
    array, done = trained
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["run"] == str(array.parent / "run")
    assert list(result["members"]["acts"]) == ["plain", "variance-a1"]
    assert result["members"]["acts"]["plain"]["tokens"] == 640


def test_ctrl_c_says_what_is_kept_and_the_command_it_names_goes_on(array, capsys):
    run = array.parent / "run"
    words = ["--k", "2", "--expansion", "2", "--batch-size", "64", "--tokens", "40000000"]
    command = [sys.executable, "-m", "wsae.cli", "train", str(array), "--out", str(run), *words]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while not (run / "metrics.jsonl").exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert out == ""
    line = err.splitlines()[-1]
    assert line.startswith("wsae: interrupted; stopped after step ")
    assert line.endswith("--resume")
    assert "Traceback" not in err
    assert (run / "checkpoints").is_dir()
    again = shlex.split(line.split("go on with: wsae ")[1])
    assert main.main([*again, "--tokens", "99"]) == 2
    assert "holds a run of another config" in capsys.readouterr().err


def test_a_finished_run_is_resumed_from_its_own_config(trained, capsys):
    array, first = trained
    words = ["train", str(array), "--out", str(array.parent / "run"), "--resume", "--json"]
    assert main.main(words) == 0
    assert json.loads(capsys.readouterr().out) == json.loads(first.stdout)
    assert main.main([*words, "--seed", "5"]) == 2
    assert "train.seed is 0 there, 5 here" in capsys.readouterr().err


def test_a_file_in_the_way_of_the_run_is_named(array, capsys):
    out = array.parent / "acts.npy" / "run"
    assert main.main(["train", str(array), "--out", str(out), "--k", "2", "--device", "cpu"]) == 2
    assert "a file is in the way" in capsys.readouterr().err


@pytest.mark.parametrize(("module", "extra"), main.EXTRAS.items())
def test_a_missing_extra_is_one_line_that_names_it(module, extra, capsys):
    def broken() -> int:
        raise ModuleNotFoundError(f"No module named '{module}'", name=f"{module}.inner")

    assert main._guarded(broken, debug=False) == 2
    err = capsys.readouterr().err
    assert err == f"wsae: error: {module} is not installed; pip install 'wsae[{extra}]'\n"
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    name = {"PIL": "pillow", "sklearn": "scikit-learn", "huggingface_hub": "huggingface-hub"}
    needs = project["optional-dependencies"][extra]
    assert any(need.startswith(name.get(module, module)) for need in needs)


@pytest.mark.parametrize("command", ["evaluate", "report", "serve", "interpret", "compare"])
def test_a_name_longer_than_the_system_has_is_one_line(command: str, capsys) -> None:
    assert main.main([command, "9" * 400]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "a longer name than this system has" in line


def test_python_dash_m_is_the_command(tmp_path: Path) -> None:
    done = {
        module: subprocess.run(
            [sys.executable, "-m", module, "doctor", "no-such-thing", "--help"],
            capture_output=True,
            text=True,
            check=True,
            cwd=tmp_path,
        ).stdout
        for module in ("wsae", "wsae.cli")
    }
    assert done["wsae"] == done["wsae.cli"]
    assert "wsae doctor" in done["wsae"]
    command = [sys.executable, "-m", "wsae", "nonsense"]
    refused = subprocess.run(command, capture_output=True, text=True, check=False)
    assert refused.returncode == 2


def test_a_folder_that_is_gone_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "gone").mkdir()
    script = (
        "import os, runpy, sys; os.rmdir(os.getcwd()); sys.argv = ['wsae', 'doctor', 'x.npy']; "
    )
    script += "runpy.run_module('wsae', run_name='__main__')"
    command = [sys.executable, "-c", script]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, cwd=tmp_path / "gone"
    )
    assert done.returncode == 2
    assert "the current folder is gone" in done.stderr
    assert done.stderr.count("\n") == 1


NUMBERS = {
    int: ("-1", str(2**63), str(10**30)),
    float: ("nan", "inf", "-inf", "1e400"),
}
"""What no flag takes: each is refused before anything is opened."""


def numeric(command: str) -> list[tuple[str, type]]:
    """Return the flags of a command that take numbers, and of which kind."""
    module = runner.load(table.find(command))  # type: ignore[arg-type]
    found = []
    for path, field in common.leaves(module.Flags):
        kinds = [
            kind
            for kind in (float, int)
            if re.search(rf"\b{kind.__name__}\b", str(field.annotation))
        ]
        if kinds and not common.is_positional(field):
            found.append((f"--{common.flag_name(path[-1])}", kinds[0]))
    return found


def some_words(command: str) -> list[str]:
    """Return words that a command takes: those of its first example."""
    found = table.find(command)
    assert found is not None
    return shlex.split(found.examples[0])[2:]


@pytest.mark.parametrize("command", table.names())
def test_no_number_is_too_extreme_to_be_refused_in_one_line(command, tmp_path, monkeypatch, capsys):
    """Every numeric flag of every command with one of the values in turn, beside the words of its first example, whose
    files are not there."""
    monkeypatch.chdir(tmp_path)
    for i, (flag, kind) in enumerate(numeric(command)):
        value = NUMBERS[kind][i % len(NUMBERS[kind])]
        assert main.main([command, *some_words(command), f"{flag}={value}"]) == 2, (flag, value)
        out, err = capsys.readouterr()
        assert out == ""
        assert SAYS_ONE_LINE.match(err), err
        assert flag in err
        assert len(err) < 300
    assert list(tmp_path.iterdir()) == []


def test_every_number_of_a_flags_file_is_held_to_the_same_bounds(tmp_path, capsys):
    file = tmp_path / "flags.yaml"
    for value, says in (("9" * 30, "--d-sae: 9999"), ("-5", "--d-sae: -5 is not between 0")):
        file.write_text(f"source: x\nout: y\nd_sae: {value}\n")
        assert main.main(["train", "--config", str(file)]) == 2
        assert says in capsys.readouterr().err


HUGE = (
    "--d-sae=2147483647",
    "--d-sae=100000000",
    "--batch-size=2147483647",
    "--k=2147483647",
    "--lr=1e308",
    "--alpha=-1e308",
    "--seed=9223372036854775807",
)
TINY = ["--d-sae", "16", "--k", "2", "--tokens", "640", "--batch-size", "64", "--device", "cpu"]


@pytest.fixture(scope="module")
def warm(tmp_path_factory) -> Path:
    """An array to train on, in a process that has loaded what training needs."""
    array = write_array(tmp_path_factory.mktemp("warm"))
    assert main.main(["train", str(array), "--out", str(array.parent / "run"), *TINY]) == 0
    return array


@pytest.mark.parametrize("flag", HUGE)
def test_training_with_a_huge_number_ends_in_one_line_or_works(flag, warm, tmp_path):
    """In a child with little memory: what cannot be had is refused, and nothing is killed."""
    words = ["train", str(warm), "--out", str(tmp_path / "run"), *TINY, flag]
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        held = int(Path("/proc/self/statm").read_text().split()[5]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_DATA, (held + (2 << 30), held + (2 << 30)))
        sys.stdout = sys.stderr = os.fdopen(write, "w")
        code = 99
        with contextlib.suppress(BaseException):
            code = main.main(words)
        sys.stderr.flush()
        os._exit(code)
    os.close(write)
    with os.fdopen(read) as said:
        text = said.read()
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert code in (0, 2), text
    assert "unexpected" not in text
    assert code == 0 or SAYS_ONE_LINE.match(text), text


# What the shell does with the streams.


@pytest.mark.parametrize(
    ("words", "code", "says"),
    [
        ("--help >&-", 1, "wsae: error: stdout: cannot be written (Bad file descriptor)\n"),
        ("--help >&- 2>&-", 1, ""),
        ("traim >&-", 2, "wsae: error: no command 'traim'"),
        ("traim 2>&-", 2, ""),
        ("--help <&-", 0, "usage: wsae COMMAND"),
        ("--help <&- >/dev/full", 1, "wsae: error: stdout: cannot be written (No space"),
        ("train x --out y --print-config >&-", 1, "stdout: cannot be written"),
        ("traim 2>&1 >/dev/null | true", 141, ""),
    ],
)
def test_a_stream_that_is_closed_is_one_line_at_most(words: str, code: int, says: str) -> None:
    line = f"set -o pipefail; {sys.executable} -m wsae.cli {words}"
    done = subprocess.run(
        ["bash", "-c", line], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode in ((2, 141) if code == 141 else (code,)), done.stderr
    said = done.stdout + done.stderr
    assert says in said
    assert bool(said) == bool(says)
    assert "Traceback" not in said
    assert "Exception ignored" not in said


def test_a_file_opened_by_a_command_is_never_taken_for_a_closed_stream(tmp_path) -> None:
    """With every stream closed the first files opened would get their numbers, and what is said written to them."""
    out = tmp_path / "wsae.bash"
    line = f"{sys.executable} -m wsae.cli completion bash --out"
    subprocess.run(["bash", "-c", f"{line} {tmp_path}/whole"], check=True, capture_output=True)
    done = subprocess.run(["bash", "-c", f"{line} {out} <&- >&- 2>&-"], check=False)
    assert done.returncode == 1
    assert out.read_bytes() == (tmp_path / "whole").read_bytes()


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_any_name_can_be_printed_in_any_encoding(encoding: str, tmp_path: Path) -> None:
    name = "acts-\u65e5\u672c-\ud800.npy".encode("utf-8", "surrogatepass") + b"\xff"
    shown = os.fsencode(tmp_path) + b"/" + name
    env = os.environ | {"PYTHONIOENCODING": encoding, "LC_ALL": "C"}
    refused = [["report", shown]] if encoding == "ascii" else []
    for words in (*refused, ["train", shown, "--out", "y", "--print-config"]):
        done = subprocess.run(
            [sys.executable, "-m", "wsae.cli", *words, "--json"], env=env, capture_output=True, check=False
        )  # fmt: skip
        said = done.stdout + done.stderr
        assert b"Traceback" not in said
        assert b"unexpected" not in said
        if "--print-config" in words:
            assert os.fsencode(json.loads(done.stdout.decode(encoding))["source"]) == shown


def test_json_on_stdout_cannot_steer_a_terminal() -> None:
    value = {"a": "\x1b[31m\x9b\u202e\u2028\udcffé\n日"}
    text = runner.json_text(value)
    assert json.loads(text) == value
    assert all(char.isprintable() or char == "\n" for char in text)


def test_training_goes_on_with_what_a_run_made(array, capsys) -> None:
    """Kind, width and k come with the SAE, from a run or a member's folder; another width is refused in a line."""
    at = array.parent
    words = ["train", str(array), "--tokens", "128", "--batch-size", "64", "--json", "--out"]
    first = [*words, str(at / "a"), "--activation", "group_topk", "--k", "2", "4", "--d-sae", "16"]
    assert main.main(first) == 0
    assert main.main([*words, str(at / "b"), "--init-from", str(at / "a")]) == 2
    assert "2 SAEs at" in capsys.readouterr().err
    (place,) = (at / "a" / "members").glob("*/plain-group-topk-k4")
    assert main.main([*words, str(at / "b"), "--init-from", str(place), "--lr", "1e-3"]) == 0
    (member,) = json.loads((at / "b" / "config.json").read_text())["train"]["members"]
    assert (member["d_sae"], member["activation"]) == (16, {"kind": "group_topk", "k": 4})
    again = ["train", str(array), "--resume", "--out", str(at / "b")]
    assert main.main(again) == 0  # it finds the SAE again
    assert main.main([*words, str(at / "c"), "--init-from", str(place), "--d-sae", "32"]) == 2
    assert "has d_sae 16, and d_sae 32 is to be trained" in capsys.readouterr().err
    assert not (at / "c").exists()


def test_sigterm_ends_training_without_a_traceback(array) -> None:
    run = array.parent / "run"
    words = f"train {array} --out {run} --k 2 --d-sae 16 --tokens 40000000 --batch-size 64"
    process = subprocess.Popen(
        [sys.executable, "-m", "wsae.cli", *words.split()], stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 60
    while not (run / "metrics.jsonl").exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert "Traceback" not in err


@pytest.mark.parametrize(
    ("flags", "names"),
    [
        ({}, ["plain"]),
        ({"alpha": (0.5, 1.0)}, ["plain", "variance-a0.5", "variance-a1"]),
        ({"robust": "rank"}, ["plain", "variance-a1-rank"]),
        ({"gamma": "gap"}, ["plain", "gap-a1"]),
        ({"gamma": "none", "alpha": (1.0,)}, ["plain"]),
        ({"precondition": "whiten", "power": (0.5, 1.0)}, ["plain", "whiten-input-p0.5", "whiten-input-p1"]),
        (
            {"precondition": "standardise", "alpha": (0.5,)},
            ["plain", "variance-a0.5-standardise-input-p1"],
        ),
        (
            {"activation": ("topk", "jumprelu"), "k": (4, 8), "l0": (0.0, 0.1), "gamma": ("none", "gap")},
            ["plain-topk-k4", "gap-a1-topk-k4", "plain-topk-k8", "gap-a1-topk-k8"]
            + ["plain-jumprelu", "gap-a1-jumprelu", "plain-jumprelu-l0-0.1", "gap-a1-jumprelu-l0-0.1"],
        ),
        (
            {"activation": ("topk", "jumprelu"), "target_l0": (4, 8)},
            ["plain-topk-k32", "plain-jumprelu-target-l0-4", "plain-jumprelu-target-l0-8"],
        ),
        ({"d_sae": (8, 16), "lr": (1e-3, 1e-2), "twin": False},
         [f"plain-lr{lr}-d-sae{d}" for d in (8, 16) for lr in (0.001, 0.01)]),
    ],
)  # fmt: skip
def test_train_makes_the_plain_sae_and_what_is_asked_for(flags: dict, names: list[str]) -> None:
    assert plan.PlanFlags(**flags).config(1000, 0).names() == names
