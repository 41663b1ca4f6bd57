"""What stops a load, wherever in this room it is found out."""

from __future__ import annotations


class Refused(Exception):
    """Why a file cannot be loaded, as it reads behind the file's name; `load_checkpoint` makes one
    line of both."""
