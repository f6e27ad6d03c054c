"""Overrides arrive as typed, through real shells: what a user may write in bash and in zsh, with and without quotes.

A line is run by the shell with a function in the place of the command, which writes down the words that it is given;
those words are composed here. So the shell's reading is the shell's own, and a hundred lines cost one process.
"""

import functools
import os
import random
import shlex
import shutil
import subprocess
import sys
from typing import Any

import pytest
import yaml
from omegaconf import OmegaConf

from flexpert.config.compose import compose
from flexpert.errors import UserError

END = "<end of a command>"
RECORDER = f"flexpert() {{ printf '%s\\0' \"$@\" '{END}'; }}\n"

EVALUATE = "evaluate model=/m data.dirs.all=/d"
EXPERT = "expert base=/b data.dir=/d train.steps=1 router.init=random name=math"
PRETRAIN = "pretrain data.dir=/d train.steps=1"

#: Line as typed in either shell → what its key then is.
LINES: list[tuple[str, str, Any]] = [
    # mappings: one entry needs no quotes, several do (both shells expand {a,b})
    ("evaluate model=/m data.dirs={news:/d/news}", "data.dirs", {"news": "/d/news"}),
    ("evaluate model=/m ++data.dirs={news:/d/news}", "data.dirs", {"news": "/d/news"}),
    ("evaluate model=/m data.dirs='{news:/d/n,math:/d/m}'", "data.dirs", {"news": "/d/n", "math": "/d/m"}),
    ("evaluate model=/m 'data.dirs={news: /d/n, math: /d/m}'", "data.dirs", {"news": "/d/n", "math": "/d/m"}),
    ("evaluate model=/m data.dirs.news=/d/n data.dirs.math=/d/m", "data.dirs", {"news": "/d/n", "math": "/d/m"}),
    ("evaluate model=/m data.dirs={a:/d} data.dirs.b=/e", "data.dirs", {"a": "/d", "b": "/e"}),
    ("evaluate model=/m data.dirs={2024_05:/d/may}", "data.dirs", {"2024_05": "/d/may"}),
    ("evaluate model=/m data.dirs.2024_05=/d/may", "data.dirs", {"2024_05": "/d/may"}),
    ("evaluate model=/m data.dirs.v1.5=/d/v", "data.dirs", {"v1.5": "/d/v"}),
    ("evaluate model=/m 'data.dirs={1e3:/a,true:/b,null:/c}'", "data.dirs", {"1e3": "/a", "true": "/b", "null": "/c"}),
    ("evaluate model=/m 'data.dirs={a:/d (1) [x]~,b:/k=v}'", "data.dirs", {"a": "/d (1) [x]~", "b": "/k=v"}),
    ("""evaluate model=/m 'data.dirs={a:"/d, e",b:/f}'""", "data.dirs", {"a": "/d, e", "b": "/f"}),
    ("""evaluate model=/m 'data.dirs={"a:b":/d}'""", "data.dirs", {"a:b": "/d"}),
    ("""evaluate model=/m "data.dirs={a:/home/o'brien/d,b:/e}\"""", "data.dirs", {"a": "/home/o'brien/d", "b": "/e"}),
    ("pipeline 'pipeline.experts={m:[data=a,seed=3]}'", "pipeline.experts", {"m": ["data=a", "seed=3"]}),
    ("pipeline 'pipeline.owners.m=[optim.lr=1e-3,seed=3]'", "pipeline.owners", {"m": ["optim.lr=1e-3", "seed=3"]}),
    ("pipeline pipeline=smoke pipeline.gates.removal=0.5", "pipeline.gates", {"removal": 0.5}),
    # whole numbers, also as one writes large ones
    ("pretrain data.dir=/d train.tokens=50e9", "train.tokens", 50_000_000_000),
    (f"{PRETRAIN} train.batch_tokens=8192", "train.batch_tokens", 8192),
    # lists of text
    (f"{EVALUATE} exclude=news", "exclude", ["news"]),
    (f"{EVALUATE} exclude=news,math", "exclude", ["news", "math"]),
    (f"{EVALUATE} 'exclude=[news,math]'", "exclude", ["news", "math"]),
    (f"{EVALUATE} exclude='[news, math]'", "exclude", ["news", "math"]),
    (f"{EVALUATE} 'exclude=[]'", "exclude", []),
    (f"{EVALUATE} exclude=2024_05,1e3,null,true", "exclude", ["2024_05", "1e3", "null", "true"]),
    ("assemble base=/b contributions=/c/a,/c/b", "contributions", ["/c/a", "/c/b"]),
    ("assemble base=/b 'contributions=[/a (1),\"/b, c\",/d=[e]]'", "contributions", ["/a (1)", "/b, c", "/d=[e]"]),
    ("assemble base=/b \"contributions=[/home/o'brien/a,/c/b]\"", "contributions", ["/home/o'brien/a", "/c/b"]),
    ("remove model=/m experts=news", "experts", ["news"]),
    # text: paths and names
    (f"{EXPERT} title=2024_05", "title", "2024_05"),
    (f"{EXPERT} title=1e3", "title", "1e3"),
    (f"{EXPERT} title=true", "title", "true"),
    (f"{EXPERT} title=null", "title", None),
    (f"""{EXPERT} 'title="null"'""", "title", "null"),
    (f"""{EXPERT} 'title="with Hydra quotes"'""", "title", "with Hydra quotes"),
    (f"""{EXPERT} 'title="one" and "two"'""", "title", '"one" and "two"'),
    (f"""{EXPERT} title="O'Brien's data\"""", "title", "O'Brien's data"),
    (f"{EXPERT} title='a = b (c) ~ [d], {{e}}: f #g'", "title", "a = b (c) ~ [d], {e}: f #g"),
    (f"{EXPERT} title=日本語\\ ü\\ 😀", "title", "日本語 ü 😀"),
    (f"{EXPERT} title=", "title", ""),
    (f"{EXPERT} 'title=expert ${{name}}'", "title", "expert math"),
    (f"{EXPERT} 'title=\\${{name}}'", "title", "${name}"),
    (f"{EXPERT}", "output_dir", "runs/experts/math"),
    ("evaluate model=/m/a=b data.dirs.a=/d", "model", "/m/a=b"),
    ("evaluate model=/m/~x~ data.dirs.a=/d", "model", "/m/~x~"),
    ("evaluate 'model=/m/a (copy) [1], ~x' data.dirs.a=/d", "model", "/m/a (copy) [1], ~x"),
    ("evaluate model=/m/a\\ \\(copy\\)\\ \\[1\\] data.dirs.a=/d", "model", "/m/a (copy) [1]"),
    ("evaluate model=tiny data.dirs.a=/d", "model", "tiny"),
    ("prepare 'data.documents=/t/**/*.jsonl' tokenizer=/t output_dir=/o", "data.documents", "/t/**/*.jsonl"),
    ("prepare data=demo_math train_tokenizer.vocab_size=512 output_dir=/o", "data.documents", "demo:math"),
    # a prompt is not looked into at all
    ("""generate model=/m prompt='Say "hi" ${oc.env:HOME} $(id)'""", "prompt", 'Say "hi" ${oc.env:HOME} $(id)'),
    ("generate model=/m prompt=$'two\\nlines\\tand = more'", "prompt", "two\nlines\tand = more"),
    ("generate model=/m prompt='\"quoted\"'", "prompt", '"quoted"'),
    ("generate model=/m prompt=null", "prompt", "null"),
    ("generate model=/m prompt='???'", "prompt", "???"),
    ("generate model=/m prompt=", "prompt", ""),
    ("generate model=/m prompt='[1, {2: (3'", "prompt", "[1, {2: (3"),
    # numbers, switches, null, groups
    (f"{PRETRAIN} optim.lr=4e-3", "optim.lr", 4e-3),
    (f"{PRETRAIN} optim.grad_clip=null", "optim.grad_clip", None),
    (f"{PRETRAIN} train.batch_tokens=8_192", "train.batch_tokens", 8192),
    (f"{PRETRAIN} data.intra_document_attention=true", "data.intra_document_attention", True),
    (f"{PRETRAIN} data.intra_document_attention=False", "data.intra_document_attention", False),
    (f"{PRETRAIN} 'optim.betas=[0.8,0.99]'", "optim.betas", [0.8, 0.99]),
    (f"{PRETRAIN} model=small", "model.hidden_size", 512),
    (f"{PRETRAIN} model=small model.hidden_size=64", "model.hidden_size", 64),
    (f"{PRETRAIN} seed=1 seed=2", "seed", 2),
]  # fmt: skip


@pytest.fixture(scope="module", params=["bash", "zsh"])
def shell(request: pytest.FixtureRequest) -> str:
    """Path of the shell; zsh is installed where that is possible, and must be there in CI."""
    name = str(request.param)
    if shutil.which(name) is None and os.geteuid() == 0 and shutil.which("apt-get"):
        subprocess.run("apt-get update -qq; apt-get install -y -qq zsh", shell=True, capture_output=True, check=False)
    path = shutil.which(name)
    if path is None:
        assert not os.environ.get("CI"), f"{name} is missing in CI"
        pytest.skip(f"{name} is not installed and cannot be (apt-get install {name})")
    return path


def run_shell(shell: str, script: str) -> "subprocess.CompletedProcess[str]":
    """Run a script without the user's start-up files, in the root directory, where no pattern used here matches."""
    flags = ["-f"] if shell.endswith("zsh") else ["--norc", "--noprofile"]
    environment = os.environ | {"HOME": "/home/someone", "LC_ALL": "C.UTF-8"}
    return subprocess.run(
        [shell, *flags, "-c", script], capture_output=True, text=True, check=False, cwd="/", env=environment
    )


def words_of(shell: str, lines: list[str]) -> list[list[str]]:
    """The words that each `flexpert LINE` hands to the command."""
    done = run_shell(shell, RECORDER + "\n".join(f"flexpert {line}" for line in lines))
    assert done.returncode == 0, done.stderr
    commands: list[list[str]] = [[]]
    for word in done.stdout.split("\0")[:-1]:
        if word == END:
            commands.append([])
        else:
            commands[-1].append(word)
    assert len(commands) == len(lines) + 1
    return commands[:-1]


compose_once = functools.cache(lambda *words: compose(words[0], list(words[1:]))[0])


def composed(words: list[str], key: str) -> Any:
    value = compose_once(*words)  # both shells should give the same words
    for name in key.split("."):
        value = getattr(value, name)
    return value


@pytest.fixture(scope="module")
def typed(shell: str) -> dict[str, list[str]]:
    """Every line of the table, as the shell takes it apart."""
    lines = [line for line, _, _ in LINES]
    return dict(zip(lines, words_of(shell, lines), strict=True))


@pytest.mark.parametrize(("line", "key", "value"), LINES, ids=[line for line, _, _ in LINES])
def test_an_override_means_what_was_typed(typed: dict[str, list[str]], line: str, key: str, value: Any) -> None:
    result = composed(typed[line], key)
    if line.startswith("pipeline "):  # an item is added to what the group holds
        assert result | value == result
    else:
        assert result == value
    assert type(result) is type(value)


@pytest.mark.parametrize(
    "line",
    [
        f"{EVALUATE} exclude=[news,math]",
        f"{EVALUATE} sweep_active_experts=[1,2]",
        "prepare tokenizer=/t output_dir=/o data.documents=/nowhere/*.jsonl",
        f"{EXPERT} title=why?",
    ],
)
def test_zsh_wants_quotes_around_brackets_stars_and_question_marks(shell: str, line: str) -> None:
    """bash hands a pattern that matches no file to the command; zsh reports it and does not start the command."""
    if shell.endswith("zsh"):
        done = run_shell(shell, f"{RECORDER}flexpert {line}")
        assert done.returncode != 0
        assert "no matches found" in done.stderr
        assert done.stdout == ""
    else:
        assert words_of(shell, [line]) == [line.split()]
    quoted = " ".join(f"'{word}'" for word in line.split())
    (words,) = words_of(shell, [quoted])
    compose(words[0], words[1:])


def test_a_mapping_of_several_without_quotes_is_refused_with_the_remedy(shell: str) -> None:
    (words,) = words_of(shell, ["evaluate model=/m data.dirs={news:/d/n,math:/d/m}"])
    assert words[2:] == ["data.dirs=news:/d/n", "data.dirs=math:/d/m"]
    with pytest.raises(UserError, match=r"^data\.dirs=news:/d/n is not a mapping.*quotes"):
        compose(words[0], words[1:])


def test_a_list_with_a_blank_without_quotes_is_refused_with_the_remedy() -> None:
    with pytest.raises(UserError, match=r"^exclude=\[news, is a list without its end.*quotes"):
        compose("evaluate", ["model=/m", "data.dirs.a=/d", "exclude=[news,", "math]"])


def test_parentheses_without_quotes_do_not_reach_the_command(shell: str) -> None:
    done = run_shell(shell, f"{RECORDER}flexpert remove experts=news model=/m/a(1)")
    assert done.returncode != 0
    assert done.stdout == ""


def test_a_tilde_after_the_equals_sign_is_expanded_by_bash_alone_and_only_for_keys_without_a_dot(shell: str) -> None:
    (words,) = words_of(shell, ["pretrain base=~/m data.dir=~/d"])
    expanded = "base=/home/someone/m" if shell.endswith("bash") else "base=~/m"
    assert words[1:] == [expanded, "data.dir=~/d"]


def test_a_name_like_a_number_stays_text_and_is_refused_as_an_id(shell: str) -> None:
    """The installed command itself, started by the shell."""
    command = shlex.join([sys.executable, "-m", "flexpert"])
    done = run_shell(shell, f"{command} expert base=/b data.dir=/d train.steps=1 router.init=random name=1e3")
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith("flexpert: name=1e3 is not an expert id")


def hostile_texts(count: int) -> list[str]:
    """Text from characters that shells, Hydra, OmegaConf or YAML give a meaning to.

    Left out: `${`, which refers to another key, and what `test_an_override_means_what_was_typed` covers: null, ???
    and text within one pair of quotes.
    """
    generator = random.Random(0)
    parts = [*"abc019 _-+.,:;=~!?@#%^&*()[]{}<>|/\\'\"`$\n\té漢😀\u2028", "null", "1e3", "true", "${"[:1], " - ", ": "]
    texts = ["".join(generator.choices(parts, k=generator.randint(1, 9))) for _ in range(count)]
    return [text for text in texts if "${" not in text and not (text[0] == text[-1] and text[0] in "'\"")]


def test_any_text_survives_the_shell_and_composing_unchanged(shell: str) -> None:
    texts = [text for text in hostile_texts(160) if text not in ("null", "???")]
    assert len(texts) > 130
    overrides = [f"data.dirs.n{index}={text}" for index, text in enumerate(texts)]
    (words,) = words_of(shell, [shlex.join(["evaluate", "model=/m", *overrides])])
    assert list(composed(words, "data.dirs").values()) == texts


def test_any_text_in_quotes_survives_inside_a_list_and_a_mapping() -> None:
    texts = [text for text in hostile_texts(300) if not ('"' in text and "'" in text)]
    quoted = [f'"{text}"' if '"' not in text else f"'{text}'" for text in texts]
    assert composed(["remove", "model=/m", f"experts=[{','.join(quoted)}]"], "experts") == texts
    items = ",".join(f"n{index}:{text}" for index, text in enumerate(quoted))
    assert list(composed(["evaluate", "model=/m", f"data.dirs={{{items}}}"], "data.dirs").values()) == texts


@pytest.mark.parametrize(
    "title",
    ["2024_05", "1e3", "0x1F", "1:30", "2024-05-01", "null ", "~", "off", "yes", ".nan", "- a", "a: b", "a #b", "|",
     "", " ", "'", '"', "a\nb", "\\", "{", "[", "*x", "&x", "!x", "<<", "=", "---", "é漢😀", "\udcff"],
)  # fmt: skip
def test_text_stays_text_in_the_resolved_config(title: str) -> None:
    words = ["base=/b", "data.dir=/d", "train.steps=1", "router.init=random", "name=math", f"title={title}"]
    config, resolved = compose("expert", words)
    assert config.title == title
    assert yaml.safe_load(resolved)["title"] == title
    assert OmegaConf.create(resolved).title == title


@pytest.mark.parametrize("key", ["title", "base", "data.dir", "public_data", "seed", "optim.lr"])
def test_the_environment_cannot_be_read_from_a_config(key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET", "12345")
    words = [*EXPERT.split()[1:], f"{key}=${{oc.env:SECRET}}"]
    with pytest.raises(UserError, match=r"oc\.env") as caught:
        compose("expert", words)
    assert "12345" not in str(caught.value)
