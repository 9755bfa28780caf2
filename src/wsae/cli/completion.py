"""`wsae completion`: a script that makes a shell complete commands, flags, choices and files."""

from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, get_args, get_origin

import tyro

from wsae.cli import common, runner, table
from wsae.cli.common import UI, Common, CommonFlags, MaybePlace, flag_names, is_positional
from wsae.core.config import Config
from wsae.core.files import write_text

# Completion scripts: the commands' words as plain data, and that data in the words of each shell.

FILES = ("FILE", "PATH", "DIR", "SOURCE", "IMAGES", "MODEL", "SAE", "RUN")
"""Names of values that a file may be."""


class Word(NamedTuple):
    """A flag, or a word given by place, and what may follow it."""

    name: str
    about: str
    takes: bool = False
    """Whether a value follows."""
    choices: tuple[str, ...] = ()
    files: bool = False
    """Whether files complete it."""
    several: bool = False
    """Whether several values may follow."""


class Words(NamedTuple):
    """What a command understands."""

    name: str
    about: str
    placed: list[Word]
    flags: list[Word]


def commands() -> list[Words]:
    """Return the words of every command."""
    found = []
    for command in table.COMMANDS:
        kind = runner.load(command).Flags
        fields = dict(common.leaves(kind))
        placed = [_word("", f) for f in fields.values() if is_positional(f)]
        flags = [_word(flag, fields[path]) for flag, path in flag_names(kind).items()]
        flags.append(Word("--help", "Show the flags, with defaults and examples"))
        found.append(Words(command.name, command.summary, placed, flags))
    return found


def _word(flag: str, field: Any) -> Word:
    about = " ".join((field.description or "").split()).split(". ")[0].split("; ")[0]
    kinds = _kinds(field.annotation)
    choices = tuple(str(c) for kind in kinds if get_origin(kind) is Literal for c in get_args(kind))
    metavar = next((m.metavar for m in field.metadata if getattr(m, "metavar", None)), "")
    files = Path in kinds or metavar.replace("|", " ").split(" ")[0] in FILES
    several = get_origin(field.annotation) is tuple
    return Word(flag, about.rstrip("."), field.annotation is not bool, choices, files, several)


def _kinds(kind: Any) -> list[Any]:
    """Return the types in a union or a tuple of any depth; a Literal is one."""
    if get_origin(kind) is Literal or not get_args(kind):
        return [kind]
    return [inner for part in get_args(kind) for inner in _kinds(part)]


def _choices(*words: Word) -> str:
    return " ".join(choice for word in words for choice in word.choices)


def _quoted(text: str) -> str:
    return "'" + text.replace("'", "'\\''") + "'"


_BASH = """\
# bash completion of wsae; made by `wsae completion bash`
_wsae() {
    local cur=${COMP_WORDS[COMP_CWORD]} command=${COMP_WORDS[1]} flag="" values="" files="" i
    COMPREPLY=()
    if ((COMP_CWORD == 1)); then
        COMPREPLY=($(compgen -W @COMMANDS@ -- "$cur"))
        return
    fi
    [[ $cur == "=" ]] && cur=""
    for ((i = COMP_CWORD - 1; i > 1; i--)); do
        [[ ${COMP_WORDS[i]} == --* ]] && flag=${COMP_WORDS[i]} && break
    done
    if [[ $cur == -* ]]; then
        case $command in
@FLAGS@
        esac
        COMPREPLY=($(compgen -W "$values" -- "$cur"))
        return
    fi
    ((COMP_CWORD - i > 1)) && [[ ${COMP_WORDS[COMP_CWORD - 1]} != "=" ]] && flag="$flag ..."
    case "$command $flag" in
@VALUES@
    *) case $command in
@PLACED@
        esac ;;
    esac
    if [[ $files ]]; then
        local IFS=$'\\n'
        compopt -o filenames 2>/dev/null
        COMPREPLY=($(compgen -f -- "$cur"))
    fi
    COMPREPLY+=($(IFS=' ' compgen -W "$values" -- "$cur"))
}
complete -F _wsae wsae
"""


def _bash(found: list[Words]) -> str:
    def offered(*words: Word) -> str:
        files = "yes" if any(word.files for word in words) else ""
        return f"values={_quoted(_choices(*words))} files={files}"

    flags, values, placed = [], [], []
    for one in found:
        names = " ".join(word.name for word in one.flags)
        flags.append(f"        {one.name}) values={_quoted(names)} ;;")
        for word in one.flags:
            more = f' | "{one.name} {word.name} ..."' if word.several else ""
            if word.takes:
                values.append(f'    "{one.name} {word.name}"{more}) {offered(word)} ;;')
        if one.placed:
            placed.append(f"        {one.name}) {offered(*one.placed)} ;;")
    names = _quoted(" ".join(one.name for one in found))
    text = _BASH.replace("@COMMANDS@", names).replace("@FLAGS@", "\n".join(flags))
    return text.replace("@VALUES@", "\n".join(values)).replace("@PLACED@", "\n".join(placed))


_ZSH = """\
#compdef wsae
# zsh completion of wsae; made by `wsae completion zsh`
_wsae() {
    local curcontext=$curcontext state line
    typeset -A opt_args
    _arguments -C '1:command:->command' '*::word:->words'
    case $state in
    command)
        local -a commands=(
@COMMANDS@
        )
        _describe command commands ;;
    words)
        case $words[1] in
@WORDS@
        esac ;;
    esac
}
if [[ $funcstack[1] == _wsae ]]; then _wsae "$@"; else compdef _wsae wsae; fi
"""


def _zsh(found: list[Words]) -> str:
    def action(*words: Word) -> str:
        files = "_files" if any(word.files for word in words) else " "
        return f"({_choices(*words)})" if _choices(*words) else files

    names = [f"            {_quoted(one.name + ':' + one.about)}" for one in found]
    words = []
    for one in found:
        specs = []
        for word in one.flags:
            about = word.about.translate({92: "", 91: "(", 93: ")", 58: " -"})  # not \\ [ ] :
            many = "*-*:" if word.several else ""
            value = f":{many}{word.name.lstrip('-')}:{action(word)}" if word.takes else ""
            specs.append(f"{word.name}[{about}]{value}")
        specs.append(f"*:word:{action(*one.placed)}" if one.placed else "*: :")
        lines = " \\\n".join(f"                {_quoted(spec)}" for spec in specs)
        words.append(f"        {one.name})\n            _arguments \\\n{lines} ;;")
    text = _ZSH.replace("@COMMANDS@", "\n".join(names))
    return text.replace("@WORDS@", "\n".join(words))


def _fish(found: list[Words]) -> str:
    def quoted(text: str) -> str:
        return "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"

    lines = ["# fish completion of wsae; made by `wsae completion fish`", "complete -c wsae -f"]
    for one in found:
        about = f"-a {one.name} -d {quoted(one.about)}"
        lines.append(f"complete -c wsae -n __fish_use_subcommand {about}")
    for one in found:
        start = f"complete -c wsae -n '__fish_seen_subcommand_from {one.name}'"
        for word in [*one.placed, *one.flags]:
            given = f" -a {quoted(_choices(word))}" if word.choices else ""
            if not word.name and (given or word.files):
                lines.append(f"{start}{' -F' if word.files else ''}{given}")
            elif word.name:
                value = " -r -F" if word.files else f" -x{given}"
                name = f"{start} -l {word.name.removeprefix('--')} -d {quoted(word.about)}"
                lines.append(name + (value if word.takes else ""))
    return "\n".join(lines) + "\n"


ABOUT = """\
Print a script that makes bash, zsh or fish complete the words of wsae. It is plain text:
completing starts no Python."""

PLACES = {
    "bash": "~/.local/share/bash-completion/completions/wsae",
    "zsh": "a directory of $fpath, as _wsae",
    "fish": "~/.config/fish/completions/wsae.fish",
}


class Flags(Config):
    """Flags of `wsae completion`."""

    shell: Annotated[
        Literal["bash", "zsh", "fish"], tyro.conf.Positional, tyro.conf.arg(metavar="SHELL")
    ]
    """bash, zsh or fish."""
    out: MaybePlace = None
    """Write the script there; default: to stdout."""
    common: CommonFlags = Common()


def run(flags: Flags, ui: UI) -> dict[str, Any]:
    """Return the shell and its script, written to --out where that is given."""
    script = {"bash": _bash, "zsh": _zsh, "fish": _fish}[flags.shell](commands())
    if flags.out is not None:
        write_text(Path(flags.out), script)
        ui.note(f"{flags.shell} reads it from {PLACES[flags.shell]}")
    out = None if flags.out is None else str(flags.out)
    return {"shell": flags.shell, "out": out, "script": script}


def show(result: dict[str, Any], ui: UI) -> None:
    """Print the script, or where it is."""
    ui.say(result["script"].rstrip("\n") if result["out"] is None else f"script: {result['out']}")
