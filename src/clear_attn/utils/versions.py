"""The versions of installed packages."""

from __future__ import annotations

import importlib.metadata


def installed_versions(*packages: str) -> dict[str, str]:
    """Return the version of each package, or "not installed".

    Examples:
        >>> installed_versions("no-such-package")
        {'no-such-package': 'not installed'}
    """
    return {name: installed_version(name) or "not installed" for name in packages}


def installed_version(package: str) -> str | None:
    """Return the version of a package, or None if it is not installed (imported from its sources, say).

    Examples:
        >>> installed_version("no-such-package") is None
        True
    """
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
