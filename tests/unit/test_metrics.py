"""`metrics.jsonl`: each step once, whatever kills and restarts have done to the file."""

from pathlib import Path

from flexpert.monitor.jsonl import MetricsLog, read_metrics


def write(path: Path, steps: range, last_step: int, note: str) -> None:
    log = MetricsLog(path, last_step)
    for step in steps:
        log.write({"step": step, "note": note, "loss": None})
    log.close()


def test_rows_are_on_disk_as_they_are_written(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path / "metrics.jsonl", 0)
    log.write({"step": 1, "loss": 2.5})
    assert read_metrics(tmp_path / "metrics.jsonl") == [{"step": 1, "loss": 2.5}]
    log.close()


def test_rows_after_the_checkpoint_are_repeated_and_not_doubled(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    write(path, range(1, 8), 0, "first")
    write(path, range(6, 11), 5, "second")
    assert [row["step"] for row in read_metrics(path)] == list(range(1, 11))
    assert [row["note"] for row in read_metrics(path)] == ["first"] * 5 + ["second"] * 5


def test_a_line_cut_by_a_kill_is_dropped_wherever_it_is_cut(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    write(path, range(1, 4), 0, "first")
    whole = path.read_bytes()
    for cut in range(whole.rindex(b"\n", 0, -1) + 1, len(whole)):
        path.write_bytes(whole[:cut])
        assert [row["step"] for row in read_metrics(path)] == [1, 2]
        write(path, range(3, 5), 3, "second")
        assert [row["step"] for row in read_metrics(path)] == [1, 2, 3, 4]
    assert [file.name for file in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_a_run_without_metrics_has_no_rows(tmp_path: Path) -> None:
    assert read_metrics(tmp_path / "metrics.jsonl") == []
