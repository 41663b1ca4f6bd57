"""`hf-hub:NAME[@REVISION]`: a repository of the Hugging Face hub, downloaded or from its cache."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from asvit_deploy.checkpoints import model_types
from asvit_deploy.checkpoints.configs import CONFIG, PREPROCESSOR, PROCESSOR, sources_beside
from asvit_deploy.checkpoints.places import WEIGHTS, choose
from asvit_deploy.checkpoints.refused import Refused
from asvit_deploy.checkpoints.shards import is_index, shards_of
from asvit_deploy.errors import UserError
from asvit_deploy.requirements import pip_install
from asvit_deploy.status import Say, silent

PREFIX = "hf-hub:"
_NAME = re.compile(
    r"hf-hub:(?P<repo>[A-Za-z0-9][\w.-]*(?:/[A-Za-z0-9][\w.-]*)?)(?:@(?P<revision>[\w./-]+))?"
)
_CONFIGS = (CONFIG, PREPROCESSOR, PROCESSOR, "open_clip_config.json")
_PATIENCE = 10.0  # seconds for the hub's first answer


def is_name(value: str) -> bool:
    """Whether a text names a repository of the hub and no file."""
    return value.startswith(PREFIX) and not Path(value).exists()


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
        raise UserError(f"{name[:80]} names no repository; pass hf-hub:OWNER/NAME or "
                        "hf-hub:OWNER/NAME@REVISION")  # fmt: skip
    try:
        from huggingface_hub import HfApi, constants, errors
    except ModuleNotFoundError as error:
        raise UserError(
            f"{name} needs huggingface_hub; {pip_install('huggingface-hub')}, or download the "
            "repository and name its folder"
        ) from error
    repo, revision = match["repo"], match["revision"] or "main"
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
        why = f"the hub cannot be reached ({type(error).__name__})"
        return _cached(name, repo, revision, why, say)
    names = [file.rfilename for file in listing.siblings or ()]
    return _downloaded(name, repo, str(listing.sha), names, say)


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
    for file in (*WEIGHTS, CONFIG):
        if (found := cached_file(repo, revision, file)) is not None:
            say(f"{name}: {why}, so its cached copy is taken ({found.parent})")
            return found.parent
    from huggingface_hub import constants, snapshot_download

    with contextlib.suppress(Exception):  # whatever it says, there is none
        # Weights under another name.
        folder = Path(snapshot_download(repo, revision=revision, local_files_only=True))
        say(f"{name}: {why}, so its cached copy is taken ({folder})")
        return folder
    raise UserError(
        f"{name} cannot be had: {why}, and the cache {constants.HF_HUB_CACHE} holds no copy of it; "
        "go online, or download it elsewhere and name its folder"
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
                beside = sources_beside(folder / WEIGHTS[0])
                model_types.refuse(beside.model_type, beside.architectures, CONFIG)
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
