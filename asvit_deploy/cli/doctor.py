"""`asvit-deploy doctor`."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import TYPE_CHECKING

import click

from asvit_deploy.cli import options
from asvit_deploy.errors import CheckFailed

if TYPE_CHECKING:
    from asvit_deploy.doctor import Finding

_COLOURS = {"ok": "green", "missing": None, "clash": "red", "broken": "red"}


@click.command()
@options.as_json
def command(as_json: bool) -> None:
    """Show what is installed, what clashes, what works, and what to do about the rest.

    Nothing is installed, downloaded or changed. Exit 1 when something that every use needs is
    missing, clashes or does not work; optional things only show in the table.
    """
    from asvit_deploy.doctor import diagnose

    findings = diagnose()
    if as_json:
        options.echo_json(json.dumps([asdict(finding) for finding in findings], indent=2))
    else:
        _print(findings)
    if fatal := [finding for finding in findings if finding.fatal]:
        raise CheckFailed("; ".join(f"{f.name}: {f.detail} -> {f.remedy}" for f in fatal))


def _print(findings: list[Finding]) -> None:
    width = max(len(finding.name) for finding in findings)
    for finding in findings:
        status = click.style(f"{finding.status:<7}", fg=_COLOURS[finding.status])
        options.echo(finding.detail, f"{finding.name:<{width}}  {status}  ")
        if finding.remedy:
            options.echo(f"{'':<{width}}  {'':<7}  -> {finding.remedy}")
