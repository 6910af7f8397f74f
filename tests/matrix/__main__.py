"""Runs the whole matrix, and writes docs/compatibility.md from it: `python -m tests.matrix`."""

import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parent / "test_matrix.py"


class Errors:
    """A plugin that collects the errors met, by the words that were expected, and what was skipped."""

    def __init__(self):
        self.met, self.skipped = {}, []

    def pytest_runtest_logreport(self, report):
        for words, error in report.user_properties if report.when == "call" else ():
            self.met.setdefault(words, error)
        if report.skipped:
            self.skipped.append(report.nodeid)


if __name__ == "__main__":
    errors = Errors()
    code = pytest.main([str(TESTS), "-m", "", "-k", "not page"], [errors])
    from tests.matrix.page import PAGE, page  # not before pytest has read conftest.py, which keeps all offline

    if code == 0 and not errors.skipped:
        PAGE.write_text(page(errors.met), encoding="utf-8")
    else:
        print(f"{PAGE.name} was not written; failed: exit code {int(code)}, skipped: {errors.skipped or 'none'}")
    sys.exit(code or bool(errors.skipped))
