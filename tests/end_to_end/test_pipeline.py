"""The whole graph in real processes: from text to report, stopped and started again."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from flexpert.cli import run_stage
from flexpert.config.compose import compose
from flexpert.launch.graph import Records, build_graph
from flexpert.launch.status import read_graph
from flexpert.records import read_record
from flexpert.signals import REQUEUE

pytestmark = pytest.mark.slow


def start(output: Path, *overrides: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "flexpert", "pipeline", "pipeline=smoke", f"output_dir={output}", *overrides]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def run(output: Path, *overrides: str) -> tuple[int, str]:
    process = start(output, *overrides)
    text = process.communicate(timeout=1200)[0]
    return process.returncode, text


@pytest.fixture(scope="module")
def smoke(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was stopped while its experts trained, and started again. The path has what paths have in the wild."""
    output = tmp_path_factory.mktemp("run") / "smoke a=(1)"
    process = start(output)
    assert process.stdout is not None
    for line in process.stdout:
        if "experts/math: started" in line:
            break
    time.sleep(1)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=300)
    assert process.returncode == REQUEUE
    assert not [
        line for line in subprocess.check_output(["ps", "axo", "args"], text=True).split("\n") if str(output) in line
    ]
    assert not (output / "assembled").exists()
    status, text = run(output)
    assert status == 0, text
    assert re.search(r"^  complete: data/public, data/math, data/news, public", text, re.MULTILINE)
    assert f"experts/math: started (log {output}/logs/experts.math.log)" in text
    assert re.search(r"  experts/math: done in \d+ s\n", text) and "  report: written\n" in text
    table = text[text.index("held-out bits per byte") :]
    assert re.search(r"│ without news +│ +\d\.\d{3} +│", table) and table.rstrip().endswith("report.html")
    return output


def test_the_layout_is_the_documented_one(smoke: Path) -> None:
    for path in (
        "data/public/train.bin", "data/math/manifest.json", "public/model/model.safetensors",
        "experts/news/contribution/contribution.json", "experts/news/metrics.jsonl", "experts/news/resolved.yaml",
        "dense/math/model/config.json", "assembled/assembly.json", "assembled/expert-math.safetensors",
        "evaluation/evaluation.json", "report.html", "pipeline.yaml", "logs/public.log",
    ):  # fmt: skip
        assert (smoke / path).is_file(), path
    assert list((smoke / "experts/math/wandb").glob("offline-run-*"))


def test_the_evaluation_covers_every_method(smoke: Path) -> None:
    record = read_record(smoke / "evaluation/evaluation.json", "flexpert.evaluation")
    expected = {
        "model",
        "without math",
        "without news",
        "active 1",
        "public",
        "dense math",
        "dense news",
        "soup",
        "btm",
    }
    assert record["methods"].keys() == expected
    assert record["domains"].keys() == {"public", "math", "news"}
    for method in record["methods"].values():
        assert all(0 < domain["bits_per_byte"] < 8 for domain in method["domains"].values())
    assert record["methods"]["model"]["active_experts"] == 3
    assert record["methods"]["without math"]["active_experts"] == 2


def times(run: Path) -> dict[Path, int]:
    """When each file was written; without what W&B links to: a log of all its processes that began in one second."""
    found = (path for path in run.rglob("*") if path.is_file() and not path.is_symlink())
    return {path: path.stat().st_mtime_ns for path in found}


def test_started_again_it_writes_the_report_and_nothing_else(smoke: Path) -> None:
    before = times(smoke)
    page = (smoke / "report.html").read_bytes()
    status, text = run(smoke)
    assert status == 0 and "started" not in text
    assert "  all 10 stages are complete\n  report: written\n" in text and "held-out bits per byte" in text
    after = times(smoke)
    changed = {path.name for path in before if before[path] != after[path]}
    assert changed <= {
        ".lock",
        "pipeline.yaml",
        "report.begun",
        "report.ended",
        "report.html",
        "report.png",
        "report.log",
        "report.json",
    }
    assert before.keys() == after.keys() and (smoke / "report.html").read_bytes() == page


def test_what_was_deleted_is_made_again_and_equal(smoke: Path) -> None:
    (smoke / "evaluation/evaluation.json").rename(smoke / "before.json")
    status, text = run(smoke)
    assert status == 0, text
    assert re.findall(r"(\S+): started", text) == ["evaluation"]
    assert (smoke / "evaluation/evaluation.json").read_bytes() == (smoke / "before.json").read_bytes()


def test_what_has_no_record_is_made_again_and_equal(smoke: Path) -> None:
    """As after a kill between the end of a stage and its record."""
    records, nodes = Records(smoke), {node.name: node for node in read_graph(smoke)}
    again = [nodes[name] for name in ("data/news", "experts/news", "assembled")]
    paths = [records.path(node) for node in again]
    before = [records.digest(node) for node in again]
    for path in paths:
        path.unlink()
    (smoke / "data/news/left").touch()
    status, text = run(smoke)
    assert status == 0, text
    assert re.findall(r"(\S+): started", text) == ["data/news", "experts/news", "assembled"]
    assert [records.digest(node) for node in again] == before
    log = (smoke / "logs/data.news.log").read_text()
    for line in ("--- data/news: started", r": train: [\d,]+ documents"):
        assert len(re.findall(line, log)) == 2, "both attempts are in the log"


def test_what_was_altered_or_made_otherwise_is_named(smoke: Path) -> None:
    graph = (smoke / "pipeline.yaml").read_bytes()
    status, text = run(smoke, "seed=1")
    assert status == 2 and "data/public was made with other overrides" in text
    changed = "pipeline.experts={math:[data=demo_math],news:[data=demo_news],code:[data=demo_code]}"
    status, text = run(smoke, changed)  # what is new could start; the conflict, far down the graph, comes first
    assert status == 2 and "assembled was made with other overrides" in text and "started" not in text
    assert (smoke / "pipeline.yaml").read_bytes() == graph
    path = smoke / "data/math/valid.bin"
    content = path.read_bytes()
    path.write_bytes(bytes([content[0] ^ 1]) + content[1:])
    status, text = run(smoke)
    path.write_bytes(content)
    assert status == 2 and "data/math was altered after it was made" in text


def test_a_failed_expert_is_told_and_the_others_finish(tmp_path: Path) -> None:
    bad = "pipeline.experts={math:[data=demo_math],news:[data=demo_news,data.documents=demo:nothing]}"
    status, text = run(tmp_path / "run", bad, "pipeline.dense=null")
    assert status == 2
    assert "data/news failed" in text and "there is no demo corpus 'nothing'" in text
    assert (tmp_path / "run/experts/math/contribution/contribution.json").is_file()
    assert not (tmp_path / "run/assembled").exists()


def test_gates_that_do_not_hold_fail_the_pipeline(smoke: Path) -> None:
    status, text = run(smoke, "pipeline.gates={gain_over_soup:100}")
    assert status == 1 and "DOES NOT HOLD" in text
    assert "0 of 1 claims hold" in (smoke / "report.html").read_text()
    status, text = run(smoke, "pipeline.gates={gain_over_soup:-100}")
    assert status == 0 and "holds" in text
    assert "1 of 1 claims hold" in (smoke / "report.html").read_text()


def test_transformers_loads_the_assembled_model_and_generates_the_same(
    smoke: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    directory, prompt = smoke / "assembled", "The number of"
    theirs, info = AutoModelForCausalLM.from_pretrained(directory, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    assert theirs.config.num_experts == 3
    run_stage("generate", [f"model={directory}", f"prompt={prompt}", "max_new_tokens=24"])
    ours = capsys.readouterr().out.removesuffix("\n")
    tokenizer = AutoTokenizer.from_pretrained(directory)
    ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
    wanted = theirs.generate(ids, max_new_tokens=24, do_sample=False)
    assert ours == tokenizer.decode(wanted[0], skip_special_tokens=False).removesuffix("<|endoftext|>")
    assert len(ours) > len(prompt)


def test_every_node_comes_after_what_it_needs() -> None:
    nodes = build_graph(compose("pipeline", ["pipeline=demo"])[0])
    seen: set[str] = set()
    for node in nodes:
        assert seen.issuperset(node.needs), node.name
        seen.add(node.name)
    assert len({Records(Path("run")).path(node) for node in nodes}) == len(nodes)
    assert os.path.commonpath([str(node.output) for node in nodes]) == "runs/demo"


def test_what_the_advice_says_to_delete_is_enough(smoke: Path) -> None:
    """The last test of this run, which it changes."""
    other = "pipeline.evaluate=[sequence_length=64,batch_sequences=8]"
    status, text = run(smoke, other, "pipeline.gates={}")
    assert status == 2 and f"delete {smoke / 'evaluation'} to make it again" in text
    shutil.rmtree(smoke / "evaluation")
    status, text = run(smoke, other, "pipeline.gates={}")
    assert status == 0 and "evaluation: done" in text, text
