"""Two processes of one command line, as torchrun starts them, forked once the libraries are there.

    python pair.py (-m asvit_deploy | PROGRAM) ARGUMENTS

Ends when both have, with the worse of their exit statuses.
"""

from __future__ import annotations

import os
import runpy
import socket
import sys

import accelerate
import torch

import asvit_deploy.training.run

LIBRARIES = (accelerate, torch, asvit_deploy)


def work(rank: int, port: int) -> None:
    """One of the two: the command, with what torchrun says of its place."""
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", LOCAL_WORLD_SIZE="2",
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port),
    )  # fmt: skip
    del sys.argv[0]
    if sys.argv[0] == "-m":
        del sys.argv[0]
        runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
    else:
        runpy.run_path(sys.argv[0], run_name="__main__")


def main() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    children = []
    for rank in range(2):
        if not (number := os.fork()):
            work(rank, port)
            sys.exit(0)
        children.append(number)
    sys.exit(max(abs(os.waitstatus_to_exitcode(os.waitpid(n, 0)[1])) for n in children))


if __name__ == "__main__":
    main()
