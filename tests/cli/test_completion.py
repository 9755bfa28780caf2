"""Completion in real shells: commands, flags, choices and files."""

import os
import pty
import re
import select
import shlex
import shutil
import subprocess
import time
from pathlib import Path
from typing import get_args

import pytest

from wsae.cli import common, main, runner, table
from wsae.cli import completion as shells
from wsae.sae.config import Kind


def script(shell: str, capsys: pytest.CaptureFixture[str]) -> str:
    assert main.main(["completion", shell]) == 0
    return capsys.readouterr().out


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "acts").mkdir()
    (tmp_path / "acts.npy").touch()
    (tmp_path / "a file.txt").touch()
    monkeypatch.chdir(tmp_path)
    return tmp_path


def in_bash(path: Path, line: str) -> set[str]:
    """Return what bash's own completion machinery is given for a line whose last word is being typed."""
    ask = r"""
source "$1"
COMP_LINE=$2 COMP_POINT=${#2}
words=${2//=/ = }
eval "COMP_WORDS=($words)"
[[ $2 == *[\ =] && ${COMP_WORDS[-1]} != "=" ]] && COMP_WORDS+=("")
COMP_CWORD=$((${#COMP_WORDS[@]} - 1))
name=$(complete -p wsae | sed 's/.*-F \([^ ]*\) .*/\1/')
$name wsae "${COMP_WORDS[COMP_CWORD]}" "${COMP_WORDS[COMP_CWORD - 1]}"
printf '%s\n' "${COMPREPLY[@]}"
"""
    done = subprocess.run(
        ["bash", "-c", ask, "bash", str(path), line], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    return set(done.stdout.splitlines()) - {""}


KINDS = {*get_args(Kind)}
CASES = [
    ("wsae tr", {"train"}),
    ("wsae ", set(table.names())),
    ("wsae train --activ", {"--activation"}),
    ("wsae train --activation ", KINDS),
    ("wsae train --activation gr", {"group_topk"}),
    ("wsae train --activation topk --dtype ", {"float32", "bfloat16"}),
    ("wsae train --logger tensorboard ", {"tensorboard", "wandb"}),
    (
        "wsae train --no-",
        {
            "--no-tied",
            "--no-twin",
            "--no-pack",
            "--no-skip-special",
            "--no-level-auxk",
        },
    ),
    ("wsae train acts.", {"acts.npy"}),
    ("wsae train acts --out ac", {"acts", "acts.npy"}),
    ("wsae train acts --labels acts.", {"acts.npy"}),
    ("wsae train acts --k ", set()),
    ("wsae completion ", {"bash", "zsh", "fish"}),
    ("wsae train --config a\\ f", {"a file.txt"}),
]


@pytest.mark.parametrize(("line", "expected"), CASES)
def test_bash_completes(line: str, expected: set[str], place: Path, capsys) -> None:
    (place / "wsae.bash").write_text(script("bash", capsys))
    assert in_bash(place / "wsae.bash", line.replace("a\\ f", "a' 'f")) == expected


def test_bash_completes_after_an_equals_sign(place: Path, capsys) -> None:
    (place / "wsae.bash").write_text(script("bash", capsys))
    assert in_bash(place / "wsae.bash", "wsae train --activation=") == KINDS
    assert in_bash(place / "wsae.bash", "wsae train --activation=to") == {"topk"}


def test_every_flag_of_every_command_is_completed(place: Path, capsys) -> None:
    (place / "wsae.bash").write_text(script("bash", capsys))
    for command in table.COMMANDS:
        known = common.flag_names(runner.load(command).Flags)
        found = in_bash(place / "wsae.bash", f"wsae {command.name} --")
        assert found == {*known, "--help"}, command.name


def test_choices_are_those_of_the_flags() -> None:
    words = {one.name: {word.name: word for word in one.flags} for one in shells.commands()}
    assert set(words["train"]["--activation"].choices) == KINDS
    assert words["train"]["--alpha"].several
    assert not words["train"]["--resume"].takes
    assert words["harvest"]["--out"].files
    assert not words["train"]["--k"].files


needs = {
    shell: pytest.mark.skipif(shutil.which(shell) is None, reason=f"no {shell} here")
    for shell in ("zsh", "fish")
}


@needs["fish"]
@pytest.mark.parametrize(
    ("line", "expected"), [case for case in CASES if "--logger" not in case[0]]
)
def test_fish_completes(line: str, expected: set[str], place: Path, capsys) -> None:
    path = place / "wsae.fish"
    path.write_text(script("fish", capsys))
    command = f"source {shlex.quote(str(path))}; complete -C {shlex.quote(line)}"
    env = {**os.environ, "HOME": str(place), "XDG_CONFIG_HOME": str(place / "none")}
    done = subprocess.run(["fish", "-c", command], capture_output=True, text=True, env=env, check=True)  # fmt: skip
    assert done.stderr == ""
    found = {row.split("\t")[0].rstrip("/") for row in done.stdout.splitlines()}
    if line.endswith("--k "):
        assert found == set()
    elif line.startswith("wsae train --no-"):
        assert found == expected
    else:
        assert expected <= {item.replace("\\ ", " ") for item in found}, found


@needs["zsh"]
@pytest.mark.parametrize(
    ("line", "then"),
    [
        ("wsae tra", "wsae train "), ("wsae train --activ", "wsae train --activation "),
        ("wsae train --activation gr", "wsae train --activation group_topk "),
        ("wsae train acts.", "wsae train acts.npy "), ("wsae completion fi", "wsae completion fish "),
        ("wsae train --out acts.", "wsae train --out acts.npy "),
        ("wsae train --logger tensorboard wa", "wsae train --logger tensorboard wandb "),
    ],
)  # fmt: skip
def test_zsh_completes(line: str, then: str, place: Path, capsys) -> None:
    """Types the line and a tab into a terminal, and reads what the line has become."""
    (place / "_wsae").write_text(script("zsh", capsys))
    begin = (
        f"PS1='> '; fpath=({place} $fpath); autoload -Uz compinit; compinit -u -D; echo re''ady\n"
    )
    child, terminal = pty.fork()
    if child == 0:
        os.execvpe("zsh", ["zsh", "-f", "-i"], {**os.environ, "TERM": "dumb", "HOME": str(place)})
    try:
        os.write(terminal, begin.encode())
        read_until(terminal, "ready")
        # ^A and echo [ before, ] after: the line as it stands is printed, not run
        os.write(terminal, f"{line}\t".encode())
        time.sleep(0.3)
        os.write(terminal, b"]\x01echo '[\x05'\n")
        said = read_until(terminal, "]\r\n", last=True)
    finally:
        os.close(terminal)
        os.waitpid(child, 0)
    shown = re.findall(r"^\[(.*?)\]\r?$", said, flags=re.M)
    assert shown, said
    assert shown[-1].rstrip() == then.rstrip()


def read_until(terminal: int, mark: str, last: bool = False) -> str:
    """Return what a terminal shows until `mark` comes at the start of a line (`last`: at the end of one)."""
    said, deadline = "", time.monotonic() + 30
    pattern = r"^\[.*\]\r?$" if last else rf"^{mark}"
    while time.monotonic() < deadline:
        if select.select([terminal], [], [], 0.2)[0]:
            said += os.read(terminal, 65536).decode(errors="replace")
            if re.search(pattern, said.replace("\r\n", "\n"), flags=re.M):
                break
    return said.replace("\r\n", "\n")


def test_the_script_goes_where_it_is_told(place: Path, capsys) -> None:
    printed = script("bash", capsys)
    assert main.main(["completion", "bash", "--out", "c.bash"]) == 0
    out, err = capsys.readouterr()
    assert (place / "c.bash").read_text() == printed
    assert out == "script: c.bash\n"
    assert "bash-completion" in err
    assert main.main(["completion", "tcsh"]) == 2
    assert "'tcsh' is not one of" in capsys.readouterr().err
