"""Losses of a tiny model, step by step, as they were when `golden.json` was committed.

A change of that file means that training computes something else than before: the commit that makes it says why. On a
mismatch the test leaves the new file where its message says.
"""

import json
from pathlib import Path

import pytest
from toy import SHAPE, train

from flexpert.monitor.jsonl import read_metrics

GOLDEN = Path(__file__).parent / "golden.json"
#: Relative; CPUs differ in the order of sums, which twenty steps of AdamW carry on.
TOLERANCE = 1e-4
KEYS = ("loss", "z_loss", "router_z_loss", "grad_norm")


def test_losses_are_those_of_before(road: Path, expert_overrides: list[str], tmp_path: Path) -> None:
    common = ["train.steps=20", "train.microbatch_sequences=2", "optim.lr=3e-3"]
    train("pretrain", *SHAPE, f"data.dir={road}/data/public", *common, f"output_dir={tmp_path}/pretrain")
    mixed = ["router.bias=true", "router.calibration_steps=5", "public_share=0.25"]
    train("expert", *expert_overrides, *common, *mixed, f"output_dir={tmp_path}/expert")
    runs = {"pretrain": "pretrain", "expert": "expert", "calibrate": "expert/calibration"}
    rows = {name: read_metrics(tmp_path / path / "metrics.jsonl") for name, path in runs.items()}
    found = {name: {key: [row[key] for row in part] for key in KEYS} for name, part in rows.items()}
    path = tmp_path / GOLDEN.name
    path.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    golden = json.loads(GOLDEN.read_text(encoding="utf-8"))
    assert golden.keys() == found.keys()
    for name, part in golden.items():
        for key, values in part.items():
            assert found[name][key] == pytest.approx(values, rel=TOLERANCE, abs=1e-9), f"{name} {key}; now in {path}"
