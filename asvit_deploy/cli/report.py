"""`asvit-deploy report`."""

from __future__ import annotations

from typing import Any

import click

from asvit_deploy.cli import options


@click.command()
@click.argument("files", nargs=-1, type=options.PATH, metavar="FILE.json...")
@click.option("-o", "--output", type=options.PATH, help="The page [default: report.html, here].")
@options.force
def command(**chosen: Any) -> None:
    """One page of what bench, check, evaluate, calibrate and visualize wrote as JSON.

    The verdict comes first; then what the speed costs, latency over kept tokens, every variant,
    drawings, parity, environment and exact commands. It is one HTML file that needs no network.

    \b
    asvit-deploy bench as_deit_s.onnx -o bench.json
    asvit-deploy check as_deit_s.onnx --json > check.json
    asvit-deploy report bench.json check.json drawings/kept.json -o report.html
    """
    import asvit_deploy

    options.echo(asvit_deploy.report(**chosen, say=options.status))
