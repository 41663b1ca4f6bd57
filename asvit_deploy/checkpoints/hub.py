"""`hf-hub:NAME[@REVISION]`: a repository of the Hugging Face hub, downloaded or from its cache."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from asvit_deploy.checkpoints.configs import (
    CONFIG,
    PREPROCESSOR,
    PROCESSOR,
    refuse_others,
    sources_beside,
)
from asvit_deploy.checkpoints.places import WEIGHTS, choose, is_weights
from asvit_deploy.checkpoints.reading import listed, quoted
from asvit_deploy.checkpoints.refused import Refused
from asvit_deploy.checkpoints.shards import is_index, shards_of
from asvit_deploy.errors import UserError
from asvit_deploy.requirements import pip_install
from asvit_deploy.status import Say, silent

PREFIX = "hf-hub:"
# What hubs and git take is shorter; huggingface_hub has the rules in full.
_NAME = re.compile(
    r"hf-hub:(?P<repo>[A-Za-z0-9][\w.-]*(?:/[A-Za-z0-9][\w.-]*)?)"
    r"(?:@(?P<revision>[\w./-]{1,255}))?"
)
_CONFIGS = (CONFIG, PREPROCESSOR, PROCESSOR, "open_clip_config.json")
_PATIENCE = 10.0  # seconds for the hub's first answer


def is_name(value: str) -> bool:
    """Whether a text names a repository of the hub and no file."""
    # Not Path.exists, which raises where a name is too long for a file.
    return value.startswith(PREFIX) and not os.path.exists(value)


def folder_of(name: str, say: Say = silent) -> Path:
    """The folder in the hub's cache that holds a repository's configs and weights.

    Online, what is needed of it and not there yet is downloaded; offline, or where the hub cannot
    be reached, what the cache has is taken, and `say` is told.

    Raises:
        UserError: the name is none, huggingface_hub is not installed, there is no such repository
            or revision, it has no weights that are read here, or it is neither to be reached nor
            cached.
    """
    match = _NAME.fullmatch(name)
    if match is None:
        raise _no_repository(name)
    try:
        from huggingface_hub import HfApi, constants, errors
        from huggingface_hub.utils import HFValidationError, validate_repo_id
    except ModuleNotFoundError as error:
        raise UserError(
            f"{name} needs huggingface_hub; {pip_install('huggingface-hub')}, or download the "
            "repository and name its folder"
        ) from error
    repo, revision = match["repo"], match["revision"] or "main"
    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise _no_repository(name) from error
    if constants.HF_HUB_OFFLINE:
        return _cached(name, repo, revision, "HF_HUB_OFFLINE is set", say)
    try:
        listing = HfApi().model_info(repo, revision=revision, timeout=_PATIENCE)
    except errors.RevisionNotFoundError as error:
        raise UserError(f"{name} cannot be had: {repo} has no revision {revision}; name a branch, "
                        "a tag or a commit of it") from error  # fmt: skip
    except errors.RepositoryNotFoundError as error:
        raise UserError(
            f"{name} cannot be had: the hub has no such repository, or not for everybody; check "
            "the name, or log in with `hf auth login`"
        ) from error
    except Exception as error:  # each of its HTTP libraries has exceptions of its own
        return _cached(name, repo, revision, _why(error), say)
    names = [file.rfilename for file in listing.siblings or ()]
    return _downloaded(name, repo, str(listing.sha), names, say)


def _no_repository(name: str) -> UserError:
    shown = name if len(name) <= 40 and name.isprintable() else quoted(name)
    return UserError(
        f"{shown} names no repository (letters, digits and single - and ., at most 96 "
        "characters each); pass hf-hub:OWNER/NAME or hf-hub:OWNER/NAME@REVISION"
    )


def _why(error: Exception) -> str:
    """Why there is no listing of a repository, where it is not that there is none."""
    status = getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(status, int):
        return f"the hub answers with HTTP {status}"
    if isinstance(error, (ValueError, LookupError, TypeError)):
        return f"the hub's answer cannot be read ({type(error).__name__})"
    return f"the hub cannot be reached ({type(error).__name__})"


def cached_file(repo: str, revision: str, file: str) -> Path | None:
    """A file of a repository where the cache has it; nothing is downloaded."""
    try:
        from huggingface_hub import try_to_load_from_cache
    except ModuleNotFoundError:
        return None
    with contextlib.suppress(ValueError):  # no name of a repository
        found = try_to_load_from_cache(repo, file, revision=revision)
        return Path(found) if isinstance(found, str) else None
    return None


def _cached(name: str, repo: str, revision: str, why: str, say: Say) -> Path:
    """The folder of a repository in the cache, once it has weights: whoever asks for a config
    alone leaves one without."""
    from huggingface_hub import constants, snapshot_download

    cache, there = f"the cache {constants.HF_HUB_CACHE}", list[str]()
    with contextlib.suppress(Exception):  # whatever it says, there is none
        folder = Path(snapshot_download(repo, revision=revision, local_files_only=True))
        there = sorted(file.name for file in folder.iterdir() if file.is_file())
    if any(name in WEIGHTS or is_weights(name) for name in there):
        say(f"{name}: {why}, so its cached copy is taken ({folder})")
        return folder
    lacks = f"has no weights of it, only {listed(there)}" if there else "holds no copy of it"
    raise UserError(
        f"{name} cannot be had: {why}, and {cache} {lacks}; go online, or download it elsewhere "
        "and name its folder"
    )


def _downloaded(name: str, repo: str, commit: str, names: list[str], say: Say) -> Path:
    """The repository's folder, once its configs, and then the one set of weights, are there."""
    try:
        top = [file for file in names if "/" not in file]
        weights = choose(top)
        folder = None
        with _bars(say):
            for file in (file for file in _CONFIGS if file in top):
                folder = _fetched(name, repo, commit, file).parent
            if folder is not None:  # before a gigabyte of another network is downloaded
                refuse_others(sources_beside(folder / WEIGHTS[0]))
            say(f"{name}: revision {commit[:12]}, {weights}")
            found = _fetched(name, repo, commit, weights)
            if is_index(found):
                for shard in shards_of(found, there=False):
                    _fetched(name, repo, commit, shard.name)
    except Refused as refused:
        raise UserError(f"{name} {refused}") from refused
    return found.parent


def _fetched(name: str, repo: str, commit: str, file: str) -> Path:
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(repo, file, revision=commit))
    except Exception as error:  # of HTTP, of the disk, of the hub
        told = " ".join(str(error).split())[:200] or type(error).__name__
        raise UserError(f"{file} of {name} cannot be downloaded: {told}; try again, or download "
                        "the repository and name its folder") from error  # fmt: skip


@contextlib.contextmanager
def _bars(say: Say) -> Iterator[None]:
    """No progress bars where nobody listens."""
    from huggingface_hub import utils

    off: Any = say is silent and not utils.are_progress_bars_disabled()
    if off:
        utils.disable_progress_bars()
    try:
        yield
    finally:
        if off:
            utils.enable_progress_bars()
