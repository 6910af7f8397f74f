"""Run the matrix and write docs/compatibility.md: `python -m tests.matrix`; with --family, only one table."""

import argparse
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parent / "test_matrix.py"


class Run:
    """A pytest plugin that selects the tests of a family, or all, and collects the results for the page.

    Attributes:
        ran: families of the tests.
        errors: messages, by the pattern that they match.
        skipped: ids of skipped tests.
    """

    def __init__(self, family):
        self.family, self.ran, self.errors, self.skipped = family, set(), {}, []

    def pytest_collection_modifyitems(self, items):
        from tests.matrix.rows import ROWS  # after pytest has read conftest.py, which turns the Hub off

        families = {item: ROWS[item.callspec.params["row"]].family for item in items if hasattr(item, "callspec")}
        items[:] = [item for item, family in families.items() if self.family in (None, family)]
        self.ran = {families[item] for item in items}

    def pytest_runtest_logreport(self, report):
        for words, error in report.user_properties if report.when == "call" else ():
            self.errors.setdefault(words, error)
        if report.skipped:
            self.skipped.append(report.nodeid)


if __name__ == "__main__":
    parser = argparse.ArgumentParser("python -m tests.matrix", description=__doc__)
    parser.add_argument("--family", help="run and write this table alone, say FLUX.2")
    run = Run(parser.parse_args().family)
    code = pytest.main([str(TESTS), "-m", ""], [run])
    from tests.matrix.page import PAGE, page

    if code == 0 and not run.skipped:
        PAGE.write_text(page(run.ran, run.errors, PAGE.read_text(encoding="utf-8")), encoding="utf-8")
    else:
        print(f"{PAGE.name} was not written; failed: exit code {int(code)}, skipped: {run.skipped or 'none'}")
    sys.exit(code or bool(run.skipped))
