# torch is imported by the tests alone: pytest-xdist's own process, which loads this file first, has no use for it.
import functools
import gc
import os
import time
from collections import Counter
from collections.abc import Generator, Iterator

import pytest

# The networks here are tiny: a second thread costs more than it brings, in every process that a test starts as well.
os.environ["OMP_NUM_THREADS"] = "1"

ALLOWANCE = 3.0  # seconds of processor time for all contract tests of one rule: there are many rules


def pytest_collection_finish() -> None:
    """What is there by now stays, and the garbage collector, which some tests call, need not look at it each time."""
    gc.freeze()


def rule_of(item: pytest.Item) -> str | None:
    """The name of the rule that this is a contract test of: that of its parameter ``case``."""
    case = item.callspec.params.get("case") if hasattr(item, "callspec") else None
    return case.name if hasattr(case, "rule") and case.build is None else None


@pytest.fixture(scope="session", autouse=True)
def read_once() -> None:
    """What nearly every run reads: scikit-learn's digits, from a table of text, and Hydra's many small files."""
    import sklearn.datasets
    import yaml

    yaml.SafeLoader = yaml.CSafeLoader
    sklearn.datasets.load_digits = functools.cache(sklearn.datasets.load_digits)


@pytest.fixture
def fresh_accelerate() -> Iterator[None]:
    """accelerate keeps the settings of its first `Accelerator` for the whole process: without those of other tests."""
    from accelerate.state import AcceleratorState, GradientState

    def forget() -> None:
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()

    forget()
    yield
    forget()


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs leave out the pictures that every run has."""
    from .commands import undraw

    undraw(monkeypatch.setattr)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None]:
    """Tell the report what a contract test took, so that it reaches the process that writes the summary."""
    begin = time.process_time()
    try:
        yield
    finally:
        if rule := rule_of(item):
            item.user_properties.append(("contract", (rule, time.process_time() - begin)))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """What the contract tests cost; a rule above the allowance is named, but fails nothing: machines differ."""
    seconds: Counter[str] = Counter()
    for report in (report for reports in terminalreporter.stats.values() for report in reports):
        if getattr(report, "when", None) == "call":
            for name, value in report.user_properties:
                if name == "contract":
                    seconds[value[0]] += value[1]
    if seconds:
        terminalreporter.write_line(
            f"contract tests: {len(seconds)} rules, {seconds.total():.0f} s of processor time, "
            f"{seconds.total() / len(seconds):.1f} s a rule (allowance {ALLOWANCE:g} s)"
        )
    for rule, spent in seconds.most_common():
        if spent > ALLOWANCE:
            terminalreporter.write_line(f"  {rule}: {spent:.1f} s, more than the allowance")
