import os

# Triton decides when it is imported: these tests run in processes of their own, started by ../test_interpreted.py.
collect_ignore_glob = [] if os.environ.get("TRITON_INTERPRET") == "1" else ["test_*.py"]
