"""`asvit_deploy.report`."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from asvit_deploy.api.inputs import PathLike, optional_path, path_of
from asvit_deploy.status import Say, silent


def report(
    files: PathLike | Sequence[PathLike], *, output: PathLike | None = None, force: bool = False,
    say: Say = silent,
) -> Path:  # fmt: skip
    """Make one HTML page of what commands wrote as JSON.

    The same files make the same bytes. Reports on several models may be joined: the page says so,
    and has a verdict on each.

    Args:
        files: of `bench(output=...)`, `evaluate(output=...)`, `check --json`, `calibrate --json`,
            and the `kept.json` of `visualize`, whose pictures lie beside it.
        output: the page, by default `report.html`, here.
        force: replace a page that is there.
        say: gets a status line.

    Returns:
        where the page lies.

    Raises:
        UserError: no file, a file named twice, one that cannot be read or is no report of this
            tool; the page would have more than 3 MB, takes what is not installed, or cannot be
            written.
    """
    from asvit_deploy.page.reading import read_files
    from asvit_deploy.page.writing import claimed_page, write_page

    given = [files] if isinstance(files, (str, os.PathLike)) else files
    paths = [path_of(path) for path in given]
    target = optional_path(output) or Path("report.html")
    with claimed_page(target, force, *paths):
        reports = read_files(paths)
        write_page(reports, target, force)
    say(f"{target}: {len(reports)} report{'s' * (len(reports) != 1)} on one page")
    return target
