"""Reports on runs that are damaged, or whose names contain markup."""

from __future__ import annotations

import csv
import json
import math
import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from experiments import report as reports
from experiments import report_page
from experiments.finished import FILES, NothingToReport, Run, find, grouped
from experiments.report import report

from ..commands import ROOT
from .test_sweeps import finished

ODD = [None, True, -1, 10**400, math.nan, "", "text", "$x_{", "=1+1", "a\nb|<b>", "\ud800", [1, {"a": 2}], {}]
TEXTS = [
    b"", b"\n", b"null", b"3\n", b"[]\n", b'"text"\n', b"{}\n", b"{", b"\xff\xfe", b"\x00", b"[" * 5000, b"9" * 5000,
    b"{1: 2}\n", b"a: 2020-01-01", b"a: !!int ''", b"a: &a [*a]", b"a: &x {b: *x}",
]  # fmt: skip


def task(folder: Path, seed: int, **measured: Any) -> Path:
    """A run of an experiment of rounds, as `train.py` leaves it."""
    finished(folder, "sgd", seed, [0.5])
    summary = {"task": "walk", "seed": seed, "measured": {"place": 1.5, "time": 3} | measured, "seconds": 2.0}
    (folder / "summary.json").write_text(json.dumps(summary))
    return folder


def damages(like: Path, files: tuple[str, ...]) -> list[Callable[[Path], object]]:
    """Damages of a run's folder."""
    found: list[Callable[[Path], object]] = []
    for name in files:
        found += [lambda run, name=name, text=text: (run / name).write_bytes(text) for text in TEXTS]
        found.append(lambda run, name=name: ((run / name).unlink(missing_ok=True), (run / name).mkdir()))
        if not (like / name).exists():
            continue
        found.append(lambda run, name=name: (run / name).unlink())
        for end in (20, -2):
            found.append(lambda run, name=name, end=end: (run / name).write_bytes((run / name).read_bytes()[:end]))
        values = yaml.safe_load((like / name).read_text())
        inner = [(key, each) for key, value in values.items() if isinstance(value, dict) for each in value]
        for path in [*((key,) for key in values), *inner]:
            found.append(lambda run, name=name, path=path: edited(run / name, path))
            found += [lambda run, name=name, path=path, odd=odd: edited(run / name, path, odd) for odd in ODD]
    return found


def edited(file: Path, path: tuple[str, ...], *odd: Any) -> None:
    """One of the values in a file replaced, or taken out."""
    values = inside = yaml.safe_load(file.read_text())
    for key in path[:-1]:
        inside = inside[key]
    inside.pop(path[-1], None)
    inside.update(dict.fromkeys(path[-1:], *odd) if odd else {})
    file.write_text((yaml.safe_dump if file.suffix == ".yaml" else json.dumps)(values) + "\n")


@pytest.mark.parametrize("kind", ["training", "task"])
def test_every_damaged_run_has_a_row_or_a_reason(kind: str, tmp_path: Path) -> None:
    files = FILES if kind == "training" else ("summary.json",)
    make = {"training": lambda run: finished(run, "a", 0, [0.5]), "task": lambda run: task(run, 0)}[kind]
    runs, reasons, all_damages = [], [], damages(make(tmp_path / "whole"), files)
    for number, damage in enumerate(all_damages):
        run = make(tmp_path / str(number))
        damage(run)
        try:
            runs += find([run])[0]
        except NothingToReport as nothing:
            reasons.append(str(nothing).replace(str(run), "RUN"))
    assert min(len(runs), len(reasons)) > 15
    assert len(runs) + len(reasons) == len(all_damages)
    assert all(reason.startswith("no finished run in RUN (RUN: it") and reason.isprintable() for reason in reasons)
    alike: dict[Any, list[Run]] = {}
    for run in runs:
        key = str([run.options.get("data.name"), *(run.summary.get(k) for k in ("task", "evaluated_on"))])
        alike.setdefault(key, []).append(run)
    for some in alike.values():
        if kind == "task":
            reports.report_tasks(some, [], tmp_path)
        else:
            cells = grouped(some)
            header, rows = reports.table(cells, 0.5)
            assert len(rows) == len(cells) > 0
            reports.document("title", header, rows, reports._notes(cells, 0.5), []).encode()


NAMES = (
    "$x^{_$", "_hidden", "=cmd|' /C calc'!A0", "<script>alert(1)</script>", "a|b\nc", "字\x1b[31m", "![x](http://y)",
    "-0.5", "@SUM(1)", "long " * 60,
)  # fmt: skip


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A report on runs with such names, and on an intact one."""
    folder = tmp_path_factory.mktemp("made")
    for number, name in enumerate(NAMES):
        finished(folder / str(number), name, 0, [0.5, 0.6 + number / 100])
    finished(folder / "fine", "hebbian", 0, [0.5, 0.9])
    (finished(folder / "bad", "hebbian", 1, [0.9]) / "error.txt").write_bytes(b"\n<b>bad</b> | \xff\n\n")
    shown = report([folder], folder / "out")
    (left_out,) = [line for line in shown.splitlines() if line.startswith("left out")]
    assert left_out == f"left out: {folder / 'bad'}: it failed: <b>bad</b> | \ufffd"
    assert (
        sum(line.startswith(("hebbian ", "_hidden ", "a|b\\nc ", "字\\x1b[31m ")) for line in shown.splitlines()) == 4
    )
    return folder / "out"


def test_markdown_shows_names_as_they_are(made: Path) -> None:
    text = (made / "report.md").read_text(encoding="utf-8")
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert len(rows) == 2 + len(NAMES) + 1
    columns = {len(line.replace("\\\\", "").replace("\\|", "").split("|")) for line in rows}
    assert len(columns) == 1  # a cell's own | ends none
    assert "| &lt;script&gt;alert(1)&lt;/script&gt; |" in text
    assert r"| ![x]\(http://y) |" in text
    assert r"| a\|b\\nc |" in text
    assert r"| \$x^{\_\$ |" in text
    assert r"&lt;b&gt;bad&lt;/b&gt; \|" in text
    assert "<" not in text
    assert "| random_trunk |" in report_page.markdown(["random_trunk"], [])


def test_no_cell_of_the_spreadsheet_is_a_formula(made: Path) -> None:
    with (made / "report.csv").open(newline="", encoding="utf-8") as file:
        labels = [row["label"] for row in csv.DictReader(file)]
    assert {"'=cmd|' /C calc'!A0", "'@SUM(1)", "'-0.5", "hebbian", "_hidden"} <= set(labels)
    assert reports.spreadsheet(-0.5) == -0.5
    assert reports.spreadsheet(None) is None
    assert [reports.spreadsheet(text) for text in (" =1", "\uff1d1", "1-2")] == ["' =1", "'\uff1d1", "1-2"]


def test_the_page_has_no_markup_of_names(made: Path) -> None:
    page = (made / "report.html").read_text(encoding="utf-8")
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page
    assert page.count("<script") == 1  # the report's own
    assert "<b>" not in page
    assert page.count("<tr>") == 1 + len(NAMES) + 1


def test_pictures_show_names_as_they_are(tmp_path: Path) -> None:
    runs = [Run.read(finished(tmp_path / str(n), name, 0, [0.5])) for n, name in enumerate(NAMES)]
    cells = grouped(runs)
    figure = reports.curves(cells)
    (legend,) = figure.legends
    texts = [*legend.get_texts(), *(bars := reports.bars(cells)).axes[0].get_yticklabels()]
    names = [text.get_text() for text in texts]
    assert len(names) == 2 * len(NAMES)
    assert names.count("$x^{_$") == names.count("_hidden") == 2
    assert not any(text.get_parse_math() for text in texts)
    assert max(map(len, "\n".join(names).splitlines())) <= 48
    for each in (figure, bars):
        report_page.plt.close(each)


def test_an_infinite_measurement_has_a_mean_but_no_interval(tmp_path: Path) -> None:
    for seed, (place, time) in enumerate([(math.inf, 1.0), (math.inf, math.nan), (2.0, 3.0)]):
        task(tmp_path / str(seed), seed, place=place, time=time)
    shown = report([tmp_path], tmp_path / "out")
    rows = {line.split()[0]: line.split()[1:] for line in shown.splitlines() if line.startswith(("place", "time"))}
    assert rows == {"place": ["inf"], "time": ["nan"]}


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    finished(tmp_path / "run", "sgd", 0, [0.5])
    (tmp_path / "file").write_text("")
    with pytest.raises(NothingToReport, match=r"the report cannot be written to .*file: File exists"):
        report([tmp_path / "run"], tmp_path / "file")


@pytest.mark.parametrize("wrong", ["nan", "970", "-1"])
def test_an_accuracy_is_a_percentage(
    wrong: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["report.py", "runs", "--accuracy", wrong])
    with pytest.raises(SystemExit):
        runpy.run_path(str(ROOT / "scripts" / "report.py"), run_name="__main__")
    assert f"--accuracy {wrong} must be from 0 to 100" in capsys.readouterr().err
