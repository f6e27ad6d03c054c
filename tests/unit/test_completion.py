"""Tab completion in real shells: what `flexpert completion SHELL` defines is called as the shell calls it."""

import os
import pty
import re
import select
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from flexpert.cli import COMMANDS, STAGES, main
from flexpert.config.schema import all_keys
from flexpert.config.stages import STAGE_CONFIGS
from flexpert.config.tree import CONFIG_DIR, group_options

#: A line up to the cursor → the words, whole, that are proposed.
LINES: list[tuple[str, list[str]]] = [
    ("flexpert pre", ["prepare", "pretrain"]),
    ("flexpert conf", ["config"]),
    ("flexpert completion ", ["bash", "zsh"]),
    ("flexpert config tune_r", ["tune_router"]),
    ("flexpert nothing ", []),
    ("flexpert pretrain train.z", ["train.z_loss="]),
    ("flexpert config pretrain train.z", ["train.z_loss="]),
    ("flexpert pretrain seed=1 data.dirs", ["data.dirs=", "data.dirs."]),
    ("flexpert pretrain +exp", ["+experiment="]),
    ("flexpert pretrain experiment=", ["experiment=flexolmo_public"]),
    ("flexpert pretrain model=ti", ["model=tiny"]),
    ("flexpert prepare data=demo_m", ["data=demo_math"]),
    ("flexpert expert router.bias=", ["router.bias=true", "router.bias=false"]),
    ("flexpert pretrain --mu", ["--multirun"]),
    ("flexpert pretrain data.dir=da", ["data.dir=data/"]),
    ("flexpert pretrain data.dir=data/", ["data.dir=data/math/", "data.dir=data/my news/"]),
    ("flexpert pretrain data.dir=data/my\\ n", ["data.dir=data/my news/"]),
    ("flexpert pretrain 'data.dir=data/my n", ["data.dir=data/my news/"]),
    ("flexpert evaluate data.dirs.math=data/ma", ["data.dirs.math=data/math/"]),
    ("flexpert assemble contributions=[data/math,data/ma", ["contributions=[data/math,data/math/"]),
    ("flexpert generate prompt_file=te", ["prompt_file=text.txt"]),
    ("flexpert generate prompt=te", []),
    ("flexpert pretrain --config-dir=o", ["--config-dir=own/"]),
    ("flexpert pipeline --config-dir=own launcher=my", ["launcher=mysite"]),
    ("flexpert --config-dir own pipeline launcher=my", ["launcher=mysite"]),
]
#: Those of them that shells take apart in ways of their own, and one with a mistake, of which nothing is shown.
IN_SHELLS = [row for row in LINES if row[0] in (
    "flexpert pre", "flexpert nothing ", "flexpert pretrain data.dir=data/my\\ n",
    "flexpert pretrain 'data.dir=data/my n",
    "flexpert evaluate data.dirs.math=data/ma", "flexpert assemble contributions=[data/math,data/ma",
    "flexpert pipeline --config-dir=own launcher=my",
)] + [("flexpert pipeline --config-dir=none launcher=", [])]  # fmt: skip


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current directory."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv(CONFIG_DIR, "")
    for directory in ("data/math", "data/my news", "data/.hidden", "own/launcher"):
        (tmp_path / directory).mkdir(parents=True)
    (tmp_path / "data/file").touch()
    (tmp_path / "text.txt").touch()
    (tmp_path / "own/launcher/mysite.yaml").touch()
    return tmp_path


@pytest.fixture(params=["bash", "zsh"])
def shell(request: pytest.FixtureRequest) -> str:
    name = str(request.param)
    if shutil.which(name) is None:
        pytest.skip(f"{name} is not installed")
    return name


def script(shell: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "flexpert", "completion", shell], capture_output=True, text=True, check=True
    )
    return done.stdout


#: In the place of what only works while a key is pressed: prints what it is given.
DRIVERS = {
    "bash": "COMP_LINE={line} COMP_POINT={point} COMP_WORDBREAKS=$' \\t\\n\"\\'><=;|&(:'\n"
    "_flexpert\nprintf '%s\\n' \"${{COMPREPLY[@]}}\"\n",
    "zsh": 'compadd() {{ while [[ $1 != -- ]] {{ shift }}; shift; (( $# )) && print -rl -- "$@" }}\n'
    "line={line}\nwords=(${{(z)line}}); [[ $line == *' ' ]] && words+=('')\n"
    "CURRENT=$#words PREFIX=$words[-1]\n_flexpert\n",
}


def test_a_shell_is_given(shell: str) -> None:
    """bash is given the rest behind `=` and `:`, with blanks quoted; zsh whole words."""
    separator = "<next>"
    program = script(shell) + "".join(
        DRIVERS[shell].format(line=shlex.quote(line), point=len(line.encode())) + f"echo '{separator}'\n"
        for line, _ in IN_SHELLS
    )
    flags = ["-f"] if shell == "zsh" else ["--norc", "--noprofile"]
    done = subprocess.run([shell, *flags, "-c", program], capture_output=True, text=True, check=True, timeout=120)
    answers = done.stdout.split(f"{separator}\n")[:-1]
    assert len(IN_SHELLS) == 8
    for (line, words), answer in zip(IN_SHELLS, answers, strict=True):
        expected = sorted(words)
        if shell == "bash" and "'" not in line:
            kept = max(line.rpartition(" ")[2].rfind(char) for char in "=:") + 1
            kept = max(kept, len("data.dir=") if "data.dir=" in line else 0)
            expected = sorted(word[kept:].replace(" ", "\\ ") for word in words)
        assert sorted(filter(None, answer.splitlines())) == expected, line


@pytest.mark.parametrize(("line", "words"), LINES, ids=[line for line, _ in LINES])
def test_what_is_proposed_for(line: str, words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert sorted(words_for(line, capsys)) == sorted(words)


def words_for(line: str, capsys: pytest.CaptureFixture[str]) -> list[str]:
    main(["complete", "zsh", line])
    return capsys.readouterr().out.splitlines()


def test_every_stage_and_command_is_proposed(capsys: pytest.CaptureFixture[str]) -> None:
    assert words_for("flexpert ", capsys) == [*STAGES, *COMMANDS, "--help", "--version"]


@pytest.mark.parametrize("stage", STAGES)
def test_every_key_of_a_stage_is_proposed(stage: str, capsys: pytest.CaptureFixture[str]) -> None:
    words = words_for(f"flexpert {stage} ", capsys)
    assert {f"{key}=" for key, _, _ in all_keys(STAGE_CONFIGS[stage])} <= set(words)
    assert len(words) == len(set(words))


def test_every_choice_of_a_group_is_proposed(capsys: pytest.CaptureFixture[str]) -> None:
    assert words_for("flexpert pretrain model=", capsys) == [f"model={name}" for name in group_options("model")]


def test_an_answer_comes_at_once_without_hydra_or_torch() -> None:
    program = (
        "import sys; from flexpert.cli import main; main(['complete', 'bash', 'flexpert pretrain model=', '=:'])\n"
        "assert not {'torch', 'hydra', 'numpy', 'tokenizers', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", program], check=True, capture_output=True)


def read_until(terminal: int, pattern: str, seconds: float = 120.0) -> str:
    """What a terminal shows up to a match."""
    shown = ""
    deadline = time.monotonic() + seconds
    while re.search(pattern, shown) is None:
        ready, _, _ = select.select([terminal], [], [], max(0, deadline - time.monotonic()))
        assert ready, f"no {pattern!r} in {shown!r}"
        shown += os.read(terminal, 4096).decode(errors="replace")
    return shown


def test_the_tab_key_completes_a_line_on_a_terminal(shell: str) -> None:
    """An interactive shell: the words that the command gets are those that were completed."""
    flags = ["-f"] if shell == "zsh" else ["--norc", "--noprofile"]
    (Path.cwd() / "start").write_text(
        f"PS1='ready> '\nunsetopt zle_bracketed_paste 2>/dev/null\n{script(shell)}"
        "flexpert() { printf '<%s>' \"$@\" ; echo; }\n"
    )
    process, terminal = pty.fork()
    if process == 0:
        os.environ.update(TERM="dumb", HOME=str(Path.cwd()))
        os.execvp(shell, [shell, *flags, "-i"])
    try:
        os.write(terminal, b". ./start\n")
        read_until(terminal, "ready> ")
        os.write(terminal, b"flexpert pretra\t")
        read_until(terminal, "flexpert pretrain ")
        for begun, completed in (("model=ti", "model=tiny "), ("data.dir=data/my", "news/")):
            os.write(terminal, f"{begun}\t".encode())
            read_until(terminal, re.escape(completed))
        os.write(terminal, b"\n")
        read_until(terminal, re.escape("<pretrain><model=tiny><data.dir=data/my news/>"))
    finally:
        os.close(terminal)
        os.waitpid(process, 0)


@pytest.mark.parametrize("arguments", [[], ["fish"], ["bash", "zsh"]])
def test_another_shell_is_one_line(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["completion", *arguments])
    assert ended.value.code == 2
    assert capsys.readouterr().err == "flexpert: completion needs a shell: flexpert completion bash or zsh\n"
