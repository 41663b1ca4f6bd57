"""Writing the page: what must be there before anything is measured, and the file at the end."""

from __future__ import annotations

import contextlib
import importlib.util
import os
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from asvit_deploy import files, requirements
from asvit_deploy.claims import claimed
from asvit_deploy.errors import UserError
from asvit_deploy.page.reading import Report, of_dicts

_EXTRA = "report"
_NEEDED = ("jinja2", "matplotlib")
MOST_BYTES = 3_000_000  # of a page, pictures and all


def require_extra() -> None:
    """Find out before the work whether a page can be made.

    Raises:
        UserError: what draws or lays it out is not installed.
    """
    if missing := [name for name in _NEEDED if importlib.util.find_spec(name) is None]:
        raise UserError(
            f"a page takes {' and '.join(missing)}, of the extra `{_EXTRA}`; run "
            f"{requirements.pip_install_extra(_EXTRA)}"
        )


def claimed_page(
    target: Path | None, force: bool, *sources: Path | None, other: Path | None = None
) -> AbstractContextManager[None]:
    """No other run makes the page meanwhile; what would keep it from being made is found here.

    Args:
        target: where it is to go; None where no page is asked for.
        sources: files of the work itself, which the page may not replace.
        other: where the JSON goes, which is another file.

    Raises:
        UserError: the extra is missing, or `target` cannot be written or is there without `force`.
    """
    if target is None:
        return contextlib.nullcontext()
    require_extra()
    if other is not None and os.path.realpath(other) == os.path.realpath(target):
        raise UserError(f"--output and --html both name {target}; name two files")
    return claimed(target, force, lambda: files.check_writable(target, force, *sources))


def write(reports: Sequence[dict[str, Any]], target: Path, force: bool = False) -> None:
    """Make one page of what commands say as JSON.

    The same reports make the same bytes, in memory or read again from JSON. Pictures of `visualize`
    are shown only by `asvit_deploy.report`, which knows the folder that they lie in.

    Args:
        reports: as `Report.as_dict` of a bench, and so on; each says its `kind`.
        target: the page; within a claim on it (`claimed_page`), that claim says what is replaced.
        force: replace a file that is there.

    Raises:
        UserError: a report is of no kind that a page shows, or is not as its kind is; the page
            would have more than 3 MB; or it cannot be written.
    """
    write_page(of_dicts(reports), target, force)


def write_page(reports: Sequence[Report], target: Path, force: bool = False) -> None:
    """As `write`, of reports that were read."""
    from asvit_deploy.page.rendering import page_of

    with claimed_page(target, force):
        files.write_text(target, page_of(reports, MOST_BYTES))
