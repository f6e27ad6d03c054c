"""The report of a run, opened in a browser: what it shows, that it needs nothing from outside, and what it refuses."""

import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from selenium import webdriver
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By

from flexpert.config.compose import compose
from flexpert.errors import UserError
from flexpert.monitor.report import run
from flexpert.records import write_json, write_record

pytestmark = pytest.mark.slow

CHROMIUM, DRIVER = "/usr/bin/chromium", "/usr/bin/chromedriver"
APT = "apt-get update && apt-get install -y --no-install-recommends chromium chromium-driver"
SECTIONS = ["result", "methods", "routing", "removal", "losses", "facts"]
OWNERS = ["math", "code", "reference", "news", "records"]
DOMAINS = ["public", *OWNERS]
EVIL = '<img src="https://example.org/x.png" onerror="document.title=1"><b>Bold & Sons</b>'
# Method → bits per byte by domain, about what a real run gives.
BITS = {
    "model": [2.137, 0.394, 1.925, 1.782, 0.250, 0.431],
    "active 1": [2.190, 0.401, 1.951, 1.801, 0.262, 0.446],
    "active 2": [2.140, 0.394, 1.926, 1.783, 0.251, 0.432],
    "public": [2.057, 0.543, 2.052, 1.952, 0.371, 0.655],
    "soup": [2.158, 0.532, 2.072, 1.945, 0.342, 0.619],
    "btm": [2.065, 0.341, 1.757, 1.632, 0.204, 0.362],
}
DENSE = [0.317, 1.747, 1.631, 0.193, 0.349]


def write_stage(path: Path, steps: int, start: float, end: float, every: int, planned: int | None = None) -> None:
    """A training stage's metrics, with a loss that falls from `start` to `end`."""
    noise = np.random.default_rng(len(path.name)).normal(0, 0.02, steps)
    rows = []
    for step in range(1, steps + 1):
        loss = end + (start - end) * float(np.exp(-6 * step / steps))
        row = {"step": step, "tokens": step * 2048, "loss": loss * (1 + noise[step - 1]), "z_loss": 80.0}
        row |= {"grad_norm": 0.4, "lr": 2e-3, "skipped_steps": 0, "step_seconds": 0.09, "tokens_per_second": 22755.6}
        rows.append(row | ({"valid_loss": loss * 1.01} if step % every == 0 or step == steps else {}))
    path.mkdir(parents=True)
    (path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    config = {"train": {"steps": planned or steps, "tokens": None, "batch_tokens": 2048}}
    (path / "resolved.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")


def routing(domain: str, experts: list[str]) -> dict[str, Any]:
    """The domain's own expert has most of the weight, more of it in later layers."""

    def shares(own: float) -> dict[str, float]:
        rest = (1 - own) / (len(experts) - 1)
        return {name: own if name == domain else rest * (0.6 + 0.8 * place / 5) for place, name in enumerate(experts)}

    layers = [shares(0.55), shares(0.74), shares(0.83)]
    mean = {name: sum(layer[name] for layer in layers) / 3 for name in experts}
    tops = {name: 0.975 if name == domain else 0.005 for name in experts}
    return {"share": mean, "share_by_layer": layers, "top_expert_of_documents": tops}


def evaluation() -> dict[str, Any]:
    experts = DOMAINS
    methods: dict[str, Any] = {}

    def add(name: str, bits: list[float], ids: list[str], active: int | None = None) -> None:
        domains: dict[str, Any] = {d: {"bits_per_byte": b + 1e-5} for d, b in zip(DOMAINS, bits, strict=True)}
        if name != "btm":
            domains["math"]["answer_accuracy"] = round(max(0.0, 1.2 - 2 * bits[1]), 3)
        for domain in DOMAINS if ids else ():
            domains[domain]["routing"] = routing(domain, ids)
        methods[name] = {"active_experts": active, "experts": ids, "domains": domains}

    add("model", BITS["model"], experts, 6)
    for index, owner in enumerate(OWNERS):
        change = [0.21 + 0.01 * index if d == owner else 0.004 * ((index + j) % 5 - 1) for j, d in enumerate(DOMAINS)]
        left = [name for name in experts if name != owner]
        add(f"without {owner}", [b + c for b, c in zip(BITS["model"], change, strict=True)], left, 5)
    for name in ("active 1", "active 2"):
        add(name, BITS[name], experts, int(name.split()[1]))
    add("public", BITS["public"], [])
    for index, owner in enumerate(OWNERS):
        bits = [b * 1.05 for b in BITS["public"]]
        bits[index + 1] = DENSE[index]
        add(f"dense {owner}", bits, [])
    add("soup", BITS["soup"], [])
    add("btm", BITS["btm"], [])
    sizes = {name: {"documents": 40, "bytes": 61_234 + 997 * index} for index, name in enumerate(DOMAINS)}
    return {"exclude": [], "domains": sizes, "methods": methods}


def write_run(path: Path, title: str = "Sums, step by step") -> Path:
    """A complete run directory, but for the weights."""
    digest = "sha256:" + "0123456789abcdef" * 4
    split = {"documents": 412, "tokens": 612_345, "bytes": 1_734_210, "files": {}}
    for name in DOMAINS:
        (path / "data" / name).mkdir(parents=True)
        manifest = {"tokenizer_digest": digest, "vocab_size": 1024, "eos_id": 0, "license": "CC0-1.0"}
        splits = {"train": split, "valid": {**split, "documents": 40, "tokens": 21_345, "bytes": 61_234}}
        write_record(path / "data" / name / "manifest.json", "flexpert.data", {**manifest, "splits": splits})
    write_stage(path / "public", 1200, 6.9, 2.9, 200)
    entries: list[dict[str, Any]] = [{"id": "public", "title": "public", "license": None, "contribution": None}]
    for index, owner in enumerate(OWNERS):
        write_stage(path / "experts" / owner, 200, 3.0 - 0.3 * index, 2.4 - 0.3 * index, 50)
        write_stage(path / "dense" / owner, 200, 3.0 - 0.3 * index, 2.3 - 0.3 * index, 50)
        own = "sha256:" + f"{index + 1}a" * 32
        record = {"id": owner, "title": title if owner == "math" else owner, "license": "CC-BY-4.0", "digest": own}
        (path / "experts" / owner / "contribution").mkdir()
        write_record(path / "experts" / owner / "contribution/contribution.json", "flexpert.contribution", record)
        entries.append({"id": owner, "title": record["title"], "license": "CC-BY-4.0", "contribution": own})
    (path / "assembled").mkdir()
    assembly = {"base_digest": digest, "active_experts": 6, "experts": entries}
    write_record(path / "assembled/assembly.json", "flexpert.assembly", assembly)
    shape = {"model_type": "flex_olmo", "hidden_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4}
    shape |= {"intermediate_size": 384, "vocab_size": 1024, "max_position_embeddings": 512, "rms_norm_eps": 1e-6}
    write_json(path / "assembled/config.json", {**shape, "num_experts": 6, "num_experts_per_tok": 6})
    (path / "evaluation").mkdir()
    write_record(path / "evaluation/evaluation.json", "flexpert.evaluation", evaluation())
    gates = {"gain_over_public": 0.0, "gain_over_soup": 0.0, "removal_on_own": 0.1, "removal_on_others": 0.01}
    experts: dict[str, list[str]] = {name: [] for name in OWNERS}
    graph: dict[str, Any] = {"name": "demo", "base": None, "experts": experts, "dense": [], "tune_router": None}
    pipeline = {"pipeline": {**graph, "gates": {**gates, "right_expert_on_top": 0.9}}, "seed": 0}
    (path / "pipeline.yaml").write_text(yaml.safe_dump(pipeline, sort_keys=False), encoding="utf-8")
    return path


def report(path: Path) -> str:
    """Run the stage as the command line does; returns the page."""
    run(*compose("report", [f"run={path}"]))
    return (path / "report.html").read_text(encoding="utf-8")


@contextmanager
def chromium() -> Iterator[webdriver.Chrome]:
    """A headless browser that records its console and every request."""
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    profile = tempfile.mkdtemp()
    quiet = ["disable-gpu", "no-first-run", "disable-background-networking", "disable-component-update", "disable-sync"]
    for flag in ["headless", "no-sandbox", *quiet, f"user-data-dir={profile}"]:
        options.add_argument(f"--{flag}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(DRIVER))
    try:
        yield driver
    finally:
        driver.quit()
        shutil.rmtree(profile, ignore_errors=True)


@pytest.fixture(scope="module")
def browser() -> Iterator[webdriver.Chrome]:
    if not (Path(CHROMIUM).exists() and Path(DRIVER).exists()):
        message = f"the report is tested in Chromium, which is not installed: {APT}"
        if os.environ.get("CI"):
            pytest.fail(message)
        pytest.skip(message)
    with chromium() as driver:
        yield driver


@pytest.fixture(scope="module")
def complete(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = write_run(tmp_path_factory.mktemp("report") / "run", title=EVIL)
    report(path)
    return path


def log(driver: webdriver.Chrome, kind: str) -> list[dict[str, Any]]:
    return list(driver.get_log(kind))  # type: ignore[no-untyped-call]


def requests(driver: webdriver.Chrome) -> list[str]:
    messages = [json.loads(entry["message"])["message"] for entry in log(driver, "performance")]
    return [m["params"]["request"]["url"] for m in messages if m["method"] == "Network.requestWillBeSent"]


def cells(driver: webdriver.Chrome, table: str) -> dict[str, list[str]]:
    """Row key → texts of its cells after the first."""
    script = """return Array.from(document.querySelectorAll(`#${arguments[0]}-table tbody tr`)).map(
        row => [row.dataset.row, Array.from(row.cells).slice(1).map(cell => cell.textContent)])"""
    return dict(driver.execute_script(script, table))


def test_page_opens_in_a_browser_and_fetches_nothing(browser: webdriver.Chrome, complete: Path) -> None:
    log(browser, "performance")
    browser.get((complete / "report.html").as_uri())
    assert [request for request in requests(browser) if not request.startswith("data:")] == [browser.current_url]
    assert log(browser, "browser") == []
    assert [part.get_attribute("id") for part in browser.find_elements(By.TAG_NAME, "section")] == SECTIONS
    assert browser.find_elements(By.TAG_NAME, "script") == []
    for section in ("methods", "routing", "removal", "losses"):
        assert browser.find_elements(By.CSS_SELECTOR, f"#{section} svg"), section


def test_tables_show_the_numbers_of_the_evaluation(browser: webdriver.Chrome, complete: Path) -> None:
    browser.get((complete / "report.html").as_uri())
    methods = evaluation()["methods"]
    shown = cells(browser, "methods")
    assert list(shown) == ["public", "soup", "btm", "dense", "model", "active 1", "active 2"]
    for name in shown.keys() - {"dense"}:
        bits = [methods[name]["domains"][domain]["bits_per_byte"] for domain in DOMAINS]
        means = [sum(bits[1:]) / len(OWNERS), sum(bits) / len(DOMAINS)]
        assert shown[name][:-1] == [f"{value:.3f}" for value in [*bits, *means]], name
    own = [methods[f"dense {owner}"]["domains"][owner]["bits_per_byte"] for owner in OWNERS]
    assert shown["dense"][:-2] == ["–", *(f"{value:.3f}" for value in [*own, sum(own) / len(own)])]
    answers = cells(browser, "answers")
    assert answers["model"] == [f"{methods['model']['domains']['math']['answer_accuracy']:.1%}"]
    assert answers["dense"] == [f"{methods['dense math']['domains']['math']['answer_accuracy']:.1%}"]
    best = browser.find_elements(By.CSS_SELECTOR, "#methods-table tr[data-row=btm] strong")
    assert len(best) == 7  # all but public text, which the public model knows best
    # The routing map's numbers are text, row by row.
    texts = [part.text for part in browser.find_elements(By.CSS_SELECTOR, "#routing .pair svg text")]
    for domain in DOMAINS:
        for share in methods["model"]["domains"][domain]["routing"]["share"].values():
            assert f"{share:.2f}" in texts


def test_verdicts_and_shortcomings_follow_from_the_numbers(browser: webdriver.Chrome, complete: Path) -> None:
    browser.get((complete / "report.html").as_uri())
    marks = [part.text for part in browser.find_elements(By.CSS_SELECTOR, ".gates b")]
    assert marks == ["✓ holds", "✓ holds", "✓ holds", "✗ does not hold", "✓ holds"]
    text = browser.find_element(By.ID, "result").text
    assert "from 1.115 to 0.956 (−14.2%), better than the public model on every one" in text
    assert "by +0.210 to +0.250" in text
    assert "Lower on the same text: BTM (0.859) and dense fine-tunes on their own domains (0.847)." in text
    assert "Missing" not in text
    notes = browser.find_element(By.ID, "methods").text
    assert "BTM, which runs six full models on every token, is better on public (2.065, 2.137: +3.5%)" in notes
    assert "The public model alone is better on public (2.057, 2.137: +3.9%)" in notes
    assert "with seed 0" in notes


def test_markup_in_a_title_is_shown_as_text(browser: webdriver.Chrome, complete: Path) -> None:
    browser.get((complete / "report.html").as_uri())
    assert cells(browser, "experts")["math"][0] == EVIL
    assert browser.find_elements(By.TAG_NAME, "img") == []
    assert browser.title == "demo · Flexpert run"


def test_page_fits_a_phone_and_follows_the_dark_scheme(browser: webdriver.Chrome, complete: Path) -> None:
    phone = {"width": 400, "height": 800, "deviceScaleFactor": 1, "mobile": True}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", phone)
    colors = []
    for scheme in ("light", "dark"):
        feature = {"name": "prefers-color-scheme", "value": scheme}
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [feature]})
        browser.get((complete / "report.html").as_uri())
        assert browser.execute_script("return document.documentElement.scrollWidth") <= 400
        script = "const s = getComputedStyle(arguments[0]); return [s.backgroundColor, s.color, s.fill]"
        body = browser.execute_script(script, browser.find_element(By.TAG_NAME, "body"))
        label = browser.execute_script(script, browser.find_element(By.CSS_SELECTOR, "#routing svg text"))
        colors.append((body[0], body[1], label[2]))
    browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})
    assert all(light != dark for light, dark in zip(*colors, strict=True))


def test_same_run_gives_the_same_bytes(complete: Path, tmp_path: Path) -> None:
    other = shutil.copytree(complete, tmp_path / "elsewhere")
    first = [(complete / name).read_bytes() for name in ("report.html", "report.png")]
    assert first[1][:24] == b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR" + (1600).to_bytes(4, "big") + (900).to_bytes(4, "big")
    report(other)
    assert [(other / name).read_bytes() for name in ("report.html", "report.png")] == first


def test_parts_that_are_missing_are_named(tmp_path: Path) -> None:
    path = write_run(tmp_path / "run")
    report(path)
    shutil.rmtree(path / "evaluation")
    shutil.rmtree(path / "assembled")
    shutil.rmtree(path / "experts/news")
    shutil.rmtree(path / "dense/code")
    write_stage(path / "dense/code", 120, 3.0, 2.0, 50, planned=200)
    page = report(path)
    assert re.findall('<section id="([a-z]+)"', page) == SECTIONS
    for name in (
        "evaluation/evaluation.json",
        "assembled/config.json",
        "experts/news/metrics.jsonl",
        "experts/news/contribution/contribution.json",
        "the rest of dense/code: it stands at step 120 of 200",
    ):
        assert f"<li>{name}</li>" in page, name
    assert page.count("? not checked") == 5
    assert "This run has no evaluation yet" in page
    assert not (path / "report.png").exists()  # the one of the complete run would now be wrong


@pytest.mark.parametrize("left", ["pipeline.yaml", "data", "public", "experts", "dense", "assembled", "evaluation"])
def test_any_single_part_is_enough(left: str, tmp_path: Path) -> None:
    whole = write_run(tmp_path / "whole")
    (tmp_path / "run").mkdir()
    shutil.move(whole / left, tmp_path / "run" / left)
    assert re.findall('<section id="([a-z]+)"', report(tmp_path / "run")) == SECTIONS


def test_methods_that_were_not_evaluated_are_left_out(tmp_path: Path) -> None:
    """An evaluation of the mixture alone: no baselines, no removal."""
    path = write_run(tmp_path / "run")
    content = evaluation()
    content["methods"] = {"model": content["methods"]["model"]}
    write_record(path / "evaluation/evaluation.json", "flexpert.evaluation", content)
    page = report(path)
    assert "the public model was not evaluated" in page
    assert "gate gain_over_soup needs &#x27;soup&#x27;, which was not evaluated" in page
    assert "no expert was left out" in page


def test_directory_without_a_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is not a directory: give the run directory"):
        report(tmp_path / "nowhere")
    with pytest.raises(UserError, match="holds no part of a run"):
        report(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_output_can_be_another_file(tmp_path: Path) -> None:
    path = write_run(tmp_path / "run")
    run(*compose("report", [f"run={path}", f"output={tmp_path / 'page.html'}"]))
    assert (tmp_path / "page.html").is_file() and not (path / "report.html").exists()
    with pytest.raises(UserError, match="cannot be written"):
        run(*compose("report", [f"run={path}", f"output={tmp_path / 'no/page.html'}"]))


def compared(paths: list[Path], output: Path) -> str:
    run(*compose("report", [f"runs=[{','.join(map(str, paths))}]", f"output={output}"]))
    return output.read_text(encoding="utf-8")


def test_several_runs_stand_side_by_side(browser: webdriver.Chrome, complete: Path, tmp_path: Path) -> None:
    """The second has another model, one expert less, and one domain with other held-out text."""
    second = shutil.copytree(complete, tmp_path / "second")
    content = evaluation()
    for domain in DOMAINS:
        content["methods"]["model"]["domains"][domain]["bits_per_byte"] -= 0.1
    for part in (content["domains"], *(method["domains"] for method in content["methods"].values())):
        del part["records"]
    content["domains"]["news"]["bytes"] += 1
    write_record(second / "evaluation/evaluation.json", "flexpert.evaluation", content)
    shutil.rmtree(second / "dense/code")
    before = [(path / "report.html").read_bytes() for path in (complete, second)]
    compared([complete, second], tmp_path / "page.html")
    assert [(path / "report.html").read_bytes() for path in (complete, second)] == before

    log(browser, "performance")
    browser.get((tmp_path / "page.html").as_uri())
    assert [request for request in requests(browser) if not request.startswith("data:")] == [browser.current_url]
    assert log(browser, "browser") == [] and browser.title == "A demo, B demo · Flexpert runs"
    sections = [part.get_attribute("id") for part in browser.find_elements(By.TAG_NAME, "section")]
    assert sections == ["runs", "methods", "losses"]
    titles = [part.text for part in browser.find_elements(By.CSS_SELECTOR, "#methods h4")]
    assert titles == ["private mean", "mean", *DOMAINS]
    tables = {title: cells(browser, f"bits{place}") for place, title in enumerate(titles)}
    assert list(tables["mean"]) == ["public", "soup", "btm", "model", "active 1", "active 2"]
    assert tables["math"]["model"] == ["0.394", "0.294"] and tables["math"]["btm"] == ["0.341", "0.341"]
    assert tables["records"]["model"] == ["0.431", "–"]
    bits = BITS["model"][:5]
    assert tables["mean"]["model"] == [f"{sum(bits) / 5:.3f}", f"{sum(bits) / 5 - 0.1:.3f}"]
    bold = browser.find_elements(By.CSS_SELECTOR, "#methods strong")
    assert [part.text for part in bold] == [tables[title]["model"][1] for title in titles if title != "records"]
    note = browser.find_element(By.CSS_SELECTOR, "#methods .note").text
    assert "Not in every run: records." in note and "Not the same held-out text in every run: news." in note
    panels = {part.get_attribute("aria-label") for part in browser.find_elements(By.CSS_SELECTOR, "#losses svg")}
    starts = {str(label).split(":")[0] for label in panels}
    places = ["public", *(f"{kind}/{owner}" for kind in ("experts", "dense") for owner in OWNERS)]
    assert starts == {f"Loss of {place}" for place in places}
    assert all(str(label).count("B ") == (0 if "dense/code" in str(label) else 2) for label in panels)


def test_a_run_without_an_evaluation_can_be_compared(complete: Path, tmp_path: Path) -> None:
    other = write_run(tmp_path / "other")
    shutil.rmtree(other / "evaluation")
    page = compared([complete, other], tmp_path / "page.html")
    assert "B was not evaluated." in page
    shutil.copytree(complete / "public", tmp_path / "left/public")
    assert "none of the runs has" in compared([other, tmp_path / "left"], tmp_path / "page.html")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ([], "report needs run=DIR, or runs="),
        (["run=a", "runs=[b,c]", "output=o"], "report needs run=DIR, or runs="),
        (["runs=[a]", "output=o"], "must be two to eight directories"),
        (["runs=[a,b]"], "needs output=FILE"),
        (["runs=[a,b]", "output=o", "wandb=offline"], "wandb=offline is for one run"),
        (["run=a", "wandb=maybe"], "wandb=maybe is not one of off, offline, online, auto"),
    ],
)
def test_runs_that_cannot_be_compared_are_refused(overrides: list[str], message: str) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        compose("report", overrides)
