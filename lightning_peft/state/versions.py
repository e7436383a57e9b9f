"""Which version of a package is installed."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version


def installed(package: str) -> str:
    """Its version; `not installed` where no package of that name is, as where this one is run from its source."""
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
