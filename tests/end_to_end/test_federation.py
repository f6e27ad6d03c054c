"""The commands of docs/federation.md, in one directory for each site: what comes out, and what does not get out."""

import io
import json
import os
import platform
import re
import shlex
import shutil
from contextlib import chdir, redirect_stdout
from pathlib import Path
from string import Template

import pytest
from toy import TOY, write_texts

from flexpert.cli import run_stage
from flexpert.config.compose import compose
from flexpert.errors import UserError
from flexpert.launch.graph import build_graph
from flexpert.records import read_record

pytestmark = pytest.mark.slow

PAGE = Path(__file__).parents[2] / "docs/federation.md"
WORDS = {
    "math-lab": ["theorem", "lemma", "therefore", "integral", "converges"],
    "code-lab": ["subroutine", "semaphore", "bytecode", "mutex", "coroutine"],
}
TOY_EXPERT = [*TOY, "router.documents=8", "router.calibration_steps=2"]
#: What makes a command of the page a toy, by stage.
SMALL = {
    "prepare": ["valid_fraction=0.3"],
    "expert": TOY_EXPERT,
    "evaluate": ["sequence_length=16"],
    "pipeline": ["pipeline.prepare=[valid_fraction=0.3]", "pipeline.gates={}", "launcher.max_jobs=1"],
}


def blocks() -> list[tuple[str, list[str]]]:
    """Of every block of the page: the site, and its commands."""
    found = re.findall(r"```sh\n# (\S+)\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    return [(site, body.replace("\\\n", " ").splitlines()) for site, body in found]


class Sites:
    """Sites as directories. `outputs`: (site, command, what it printed); `digests`: as told, by their name."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.outputs: list[tuple[str, str, str]] = []
        self.digests: dict[str, str] = {}

    def run(self, site: str, command: str) -> None:
        words = shlex.split(Template(command).substitute(self.digests))
        if words[0] == "rsync":
            self.copy(site, words[2:-1], words[-1])
            return
        assert words[0] == "flexpert", command
        stage, overrides = words[1], words[2:]
        text = io.StringIO()
        with chdir(self.root / site), redirect_stdout(text):
            run_stage(stage, small(stage, overrides))
        self.outputs.append((site, command, text.getvalue()))
        for name, pattern in {
            "BASE": r"model=public-model$", "MATH": r"contribution=run/experts/math", "CODE": r"contribution=expert/",
            "MODEL": r"model=model$",
        }.items():  # fmt: skip
            if stage == "verify" and re.search(pattern, command):
                found = re.search(r"^  digest (sha256:\w{64})$", text.getvalue(), re.MULTILINE)
                assert found is not None, text.getvalue()
                self.digests[name] = found[1]

    def copy(self, site: str, sources: list[str], target: str) -> None:
        for source in sources:
            host, _, path = source.partition(":")
            place = self.root / site / target
            shutil.copytree(self.root / host / path, place if path.endswith("/") else place / Path(path).name)


def small(stage: str, overrides: list[str]) -> list[str]:
    """A command's overrides, at toy size."""
    if "pipeline=owner" in overrides:
        own = ",".join(TOY_EXPERT)
        overrides = [f"{o[:-1]},{own}]" if o.startswith("pipeline.owners.math=") else o for o in overrides]
        overrides = [*overrides, "pipeline.evaluate=[sequence_length=16]"]
    if "pipeline=assembler" in overrides:
        overrides = [*overrides, "pipeline.evaluate=[leave_one_out=true,sequence_length=16]"]
    return [*overrides, *SMALL.get(stage, [])]


@pytest.fixture(scope="module")
def sites(road: Path, tmp_path_factory: pytest.TempPathFactory) -> Sites:
    """After all commands of the page."""
    sites = Sites(tmp_path_factory.mktemp("federation"))
    for site in ("hub", "math-lab", "code-lab", "assembler"):
        (sites.root / site).mkdir()
    shutil.copytree(road / "public/model", sites.root / "hub/public-model")
    shutil.copytree(road / "public_texts", sites.root / "hub/web")
    for seed, (site, words) in enumerate(WORDS.items()):
        write_texts(sites.root / site / "texts", words, 40, seed)
    write_texts(sites.root / "assembler/samples", ["sums", "are", "added", "nine"], 20, seed=7)
    for site, commands in blocks():
        for command in commands:
            sites.run(site, command)
    return sites


def files(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def contributions(sites: Sites) -> dict[str, Path]:
    return {
        "math-lab": sites.root / "math-lab/run/experts/math/contribution",
        "code-lab": sites.root / "code-lab/expert/contribution",
    }


def test_the_pipeline_assembles_what_the_commands_do_and_so_does_an_owner(sites: Sites) -> None:
    model = files(sites.root / "assembler/model")
    assert files(sites.root / "assembler/run/assembled") == model == files(sites.root / "code-lab/model")
    assert {"expert-math.safetensors", "expert-code.safetensors"} < model.keys()


def test_without_an_owner_it_is_as_if_never_assembled(sites: Sites, tmp_path: Path) -> None:
    root = sites.root / "assembler"
    never = [f"base={root}/public-model", f"contributions={root}/received/code", f"output_dir={tmp_path}/never"]
    run_stage("assemble", never)
    assert files(root / "model-without-math") == files(tmp_path / "never")


def test_the_evaluation_has_every_domain_that_was_given_and_every_removal(sites: Sites) -> None:
    root = sites.root / "assembler"
    record = read_record(root / "run/evaluation/evaluation.json", "flexpert.evaluation")
    assert record["domains"].keys() == {"public", "math"}
    assert record["methods"].keys() == {"model", "without math", "without code", "public"}
    assert record == read_record(root / "evaluation/evaluation.json", "flexpert.evaluation")
    private = read_record(sites.root / "math-lab/run/evaluation/evaluation.json", "flexpert.evaluation")
    assert private["domains"].keys() == {"public", "math"}
    assert private["methods"]["model"]["experts"] == ["public", "math"]


@pytest.mark.parametrize("site", WORDS)
def test_a_contribution_holds_no_text_and_no_name_of_its_site(sites: Sites, site: str) -> None:
    directory = contributions(sites)[site]
    content = files(directory)
    assert content.keys() == {"contribution.json", "expert.safetensors"}
    places = [path.name for path in (sites.root / site / "texts").iterdir()]
    needles = [*WORDS[site], *places, site, str(sites.root), "texts", "public-model", "public-text"]
    for name, data in content.items():
        assert [needle for needle in needles if needle.encode() in data] == [], name
    header = content["expert.safetensors"][8 : 8 + int.from_bytes(content["expert.safetensors"][:8], "little")]
    assert json.loads(header)["__metadata__"] == {"format": "pt"}
    host = re.compile(rf"\b{re.escape(platform.node())}\b".encode())
    assert host.search(content["contribution.json"]) is None and host.search(header) is None


def test_nothing_of_the_owners_is_at_the_assembler_but_their_contributions(sites: Sites) -> None:
    """Nor are the owners' paths in what the pipeline has written there."""
    for path in (path for path in (sites.root / "assembler").rglob("*") if path.is_file()):
        data = path.read_bytes()
        for site, words in WORDS.items():
            assert not any(needle.encode() in data for needle in [*words, str(sites.root / site)]), path
    for site, name in (("math-lab", "math"), ("code-lab", "code")):
        assert files(sites.root / "assembler/received" / name) == files(contributions(sites)[site])


def test_records_say_what_was_verified(sites: Sites) -> None:
    folder = sites.root / "assembler/run/verified"
    base, math = (read_record(folder / f"{name}.json", "flexpert.verified") for name in ("base", "math"))
    assert (base["id"], base["digest"], base["base_digest"]) == ("public", sites.digests["BASE"], sites.digests["BASE"])
    assert (math["id"], math["digest"], math["base_digest"]) == ("math", sites.digests["MATH"], sites.digests["BASE"])
    size = (sites.root / "assembler/received/math/expert.safetensors").stat().st_size
    assert (math["files"], math["bytes"]) == (1, size)


@pytest.mark.parametrize("run", ["assembler/run", "math-lab/run"])
def test_the_report_misses_nothing_that_such_a_pipeline_does_not_make(sites: Sites, run: str) -> None:
    page = (sites.root / run / "report.html").read_text(encoding="utf-8")
    assert "Missing from this run" not in page and "dense" not in page.split("</style>")[1]
    assert sites.digests["MATH"] in page and (sites.digests["CODE"] in page) == run.startswith("assembler")
    for domain in ("public", "math"):
        assert page.split('id="data-table"')[1].split("</table>")[0].count(f'data-row="{domain}"') == 1
    assert ("owners trained them" in page) == run.startswith("assembler")


def test_the_report_names_what_was_sent_and_is_no_longer_there(sites: Sites, tmp_path: Path) -> None:
    run = shutil.copytree(sites.root / "assembler/run", tmp_path / "run")
    shutil.rmtree(run / "verified")
    with chdir(tmp_path):  # where received/ and public-text/ are not
        run_stage("report", [f"run={run}", "wandb=off"])
    missing = re.findall("<li>([^<]+)</li>", (run / "report.html").read_text(encoding="utf-8").split("Missing from")[1])
    assert missing[:7] == [
        "public-text/manifest.json", "math-sample/manifest.json", "received/math/contribution.json",
        "received/code/contribution.json", "verified/base.json", "verified/math.json", "verified/code.json",
    ]  # fmt: skip


def test_on_slurm_every_stage_of_an_owner_is_a_script(sites: Sites) -> None:
    scripts = {path.stem for path in (sites.root / "math-lab/run-slurm/slurm").glob("*.sbatch")}
    assert scripts == {"verified.base", "data.math", "experts.math", "assembled", "evaluation", "report"}
    text = (sites.root / "math-lab/run-slurm/slurm/experts.math.sbatch").read_text()
    assert "#SBATCH --account=A\n" in text and "#SBATCH --nodes=2\n" in text


def assemble(sites: Sites, output: Path, received: dict[str, Path], *overrides: str) -> None:
    """The pipeline `assembler`, started for other contributions."""
    root = sites.root / "assembler"
    given = ",".join(f"{name}:{path}" for name, path in received.items())
    sets = [f"pipeline.prepared.public={root}/public-text", "monitor.wandb=off", f"output_dir={output}"]
    words = ["pipeline=assembler", f"pipeline.base={root}/public-model", f"pipeline.contributions={{{given}}}"]
    run_stage("pipeline", small("pipeline", [*words, *sets, *overrides]))


def test_a_contribution_under_another_name_is_refused_before_anything_starts(sites: Sites, tmp_path: Path) -> None:
    received = sites.root / "assembler/received"
    with pytest.raises(UserError, match=r"pipeline\.contributions\.news=.*received/math is the expert 'math'"):
        assemble(sites, tmp_path / "run", {"code": received / "code", "news": received / "math"})
    assert not (tmp_path / "run").exists()


def test_a_digest_that_differs_from_what_was_told_stops_the_assembly(
    sites: Sites, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    received = sites.root / "assembler/received"
    with pytest.raises(SystemExit) as ended:
        told = f"pipeline.digests={{math:{sites.digests['CODE']}}}"
        assemble(sites, tmp_path / "run", {"math": received / "math"}, told)
    error = capsys.readouterr().err
    assert ended.value.code == 2 and error.count("\n") == 1
    assert f"has the digest {sites.digests['MATH']}, not {sites.digests['CODE']}" in error
    assert not (tmp_path / "run/assembled").exists() and not (tmp_path / "run/verified/math.json").exists()


def test_another_version_of_a_contribution_needs_another_run(sites: Sites) -> None:
    """The one that a run has used is the one that it has verified."""
    path = sites.root / "assembler/received/math/contribution.json"
    command = next(text for _, text, _ in sites.outputs if "pipeline=assembler" in text)
    before = path.read_text()
    path.write_text(json.dumps(json.loads(before) | {"digest": sites.digests["CODE"]}))
    with pytest.raises(UserError, match="is not what this run has verified and used: choose another output_dir"):
        sites.run("assembler", command)
    path.write_text(before)


def test_what_was_sent_cannot_be_used_without_having_been_verified(sites: Sites) -> None:
    """Also where nothing is required: it is there, so it could not be left out as an expert that has failed is."""
    code = sites.root / "assembler/received/code"
    own = ["pipeline.experts={math:[data.documents=x]}", f"pipeline.contributions={{code:{code}}}"]
    words = ["pipeline=assembler", "pipeline.base=/base", "pipeline.required=[]", *own]
    config, _ = compose("pipeline", words)
    (assembled,) = (node for node in build_graph(config) if node.name == "assembled")
    assert (assembled.needs, assembled.wants) == (("verified/code",), ("experts/math",))


def test_without_a_base_nothing_is_trained_in_its_place(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"give pipeline\.base=DIR, a public model"):
        run_stage("pipeline", ["pipeline=owner", "pipeline.experts.math=[data.documents=x]", f"output_dir={tmp_path}"])
    assert os.listdir(tmp_path) == []
