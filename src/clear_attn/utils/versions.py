"""The versions of installed packages."""

from __future__ import annotations

import importlib.metadata


def installed_versions(*packages: str) -> dict[str, str]:
    """Return the version of each package, or "not installed".

    Examples:
        >>> installed_versions("no-such-package")
        {'no-such-package': 'not installed'}
    """
    return {name: _version(name) for name in packages}


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
