"""What the workers of pytest-xdist share."""

import json
import os

from filelock import FileLock


def once_in_all_workers(tmp_path_factory, name, function):
    """Call a function in one worker and return its result, of JSON's types, in all of them."""
    if "PYTEST_XDIST_TESTRUNUID" not in os.environ:
        return function()
    file = tmp_path_factory.getbasetemp().parent / f"{name}.json"
    with FileLock(f"{file}.lock"):
        if not file.exists():
            file.write_text(json.dumps(function()))
        return json.loads(file.read_text())
