"""Hooks of mkdocs: a link to the clone's repository; pages for the notebooks in `examples/` and the command line."""

import re
import subprocess
import sys
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.plugins import event_priority
from mkdocs.structure.files import File, Files

# https, with or without credentials, or ssh.
REMOTE = re.compile(r"(?:https://|ssh://)?(?:[^@/]+@)?(?P<host>[\w-]+(?:\.[\w-]+)+)[:/](?P<path>[\w./-]+?)(?:\.git)?/?")


def web_address(remote: str) -> str | None:
    """Return the address of a remote's page, or None for a remote that is a folder or missing."""
    found = REMOTE.fullmatch(remote)
    return f"https://{found['host']}/{found['path']}" if found else None


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    root = Path(config.config_file_path).parent
    command = ["git", "-C", str(root), "remote", "get-url", "origin"]
    remote = subprocess.run(command, capture_output=True, text=True).stdout.strip()
    if url := config.repo_url or web_address(remote):
        config.repo_url, config.repo_name = url, config.repo_name or url.split("/", 3)[-1]
    return config


def command_line() -> str:
    """Return the help of all commands as Markdown."""
    command = [sys.executable, "-m", "typer", "clear_attn.tools.cli", "utils", "docs", "--name", "clear-attn"]
    return subprocess.run([*command, "--title", "Command line"], capture_output=True, text=True, check=True).stdout


@event_priority(100)  # before mkdocs-jupyter, which renders them
def on_files(files: Files, config: MkDocsConfig) -> Files:
    root = Path(config.config_file_path).parent
    for notebook in sorted(root.glob("examples/*.ipynb")):
        path = notebook.relative_to(root).as_posix()
        files.append(File(path, str(root), config.site_dir, config.use_directory_urls))
    files.append(File.generated(config, "command-line.md", content=command_line()))
    return files
