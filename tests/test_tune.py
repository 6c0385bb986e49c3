"""`scripts/tune.py`: errors before and during a search."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import optuna
import pytest

from experiments import interrupts
from scripts import tune


@pytest.fixture
def search(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """The exit code of a search and its standard error; ``result`` is the accuracy of its runs."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(interrupts, "catch", lambda: None)  # the signals of the tests' own process stay

    def of(*arguments: str, result: float | BaseException = 0.5) -> tuple[int, str]:
        def isolated(config: Any) -> dict[str, float]:
            if isinstance(result, BaseException):
                raise result
            return {"test_accuracy": result}

        monkeypatch.setattr(tune, "isolated", isolated)
        rule = [] if any("experiment=" in argument for argument in arguments) else ["optimizer=sgd"]
        monkeypatch.setattr(sys, "argv", ["tune.py", *rule, *arguments])
        try:
            with interrupts.reported():
                tune.main()
        except SystemExit as end:
            return end.code, capsys.readouterr().err  # type: ignore[return-value]
        return 0, capsys.readouterr().err

    return of


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["optimizer.lr=interval(2.0, 1.0)"], "optimizer.lr=interval(2.0, 1.0) cannot be searched (`low <= high` must"),
        (["optimizer.lr=tag(log, interval(0.0, 1.0))"], "cannot be searched (`low > 0` must hold"),
        (["task.most=1,2", "experiment=savings"], "error: experiment=savings has no test accuracy"),
        (["optimizer.lr=1,2", "--name", "../x"], "error: --name=../x"),
        (["optimizer.lr=1,2", "--name", "bad"], "study.db cannot be used ((sqlite3.DatabaseError) file is not a"),
        (["optimizer.lr=1,2", "--trials", "0"], "error: --trials 0 must be at least 1"),
    ],
)
def test_an_impossible_search_raises_a_clear_error(
    arguments: list[str], message: str, search: Any, tmp_path: Path
) -> None:
    (tmp_path / "runs" / "bad").mkdir(parents=True)
    (tmp_path / "runs" / "bad" / "study.db").write_text("this is no data base, but a line of text")
    code, error = search(*arguments)
    assert code in (1, 2)
    assert message in error
    assert sorted(path.name for path in tmp_path.iterdir()) == ["runs"]


def test_other_values_need_another_study(search: Any) -> None:
    assert search("optimizer.lr=1,2", "--name", "one", "--trials", "1") == (0, "")
    code, error = search("optimizer.lr=1,3", "--name", "one", "--trials", "2")
    assert code == 1
    assert "optimizer.lr=1,3 cannot be searched" in error
    assert "start a new study with --name" in error


def test_an_interrupted_search_resumes_with_the_same_trial(search: Any, tmp_path: Path) -> None:
    command = ("optimizer.lr=interval(0.1, 1.0)", "--name", "one", "--trials", "1")
    code, error = search(*command, result=KeyboardInterrupt())
    assert code == 130
    assert error.startswith(
        "interrupted by SIGINT; resume with: python scripts/tune.py optimizer=sgd 'optimizer.lr=int"
    )
    assert search(*command) == (0, "")
    study = optuna.load_study(study_name="one", storage=f"sqlite:///{tmp_path}/runs/one/study.db")
    first, second = study.trials
    assert first.params == second.params
    assert second.value == 0.5
