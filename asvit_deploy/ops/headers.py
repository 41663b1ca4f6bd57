"""Where ONNX Runtime's C++ headers come from: given, installed, cached, or out of Debian.

An older header works with a newer runtime, never the reverse: headers newer than the installed
onnxruntime are refused.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from asvit_deploy import trusted
from asvit_deploy.disk import require_room, unfitting
from asvit_deploy.errors import UserError
from asvit_deploy.files import cached, make_cache_dir, scratch
from asvit_deploy.ops.prebuilt import usable_tree
from asvit_deploy.status import Say, silent

MINIMUM_API = 17  # the first with shape inference for custom ops
HEADER = "onnxruntime_c_api.h"
# As Debian installs it, as a source tree has it, and as a release archive has it.
LAYOUTS = ("", "onnxruntime", "onnxruntime/core/session", "core/session", "include")
APT = Path("/etc/apt")
KEYRINGS = tuple(
    Path(f"/usr/share/keyrings/debian-archive-keyring.{kind}") for kind in ("gpg", "pgp")
)
SUITE = re.compile(
    "(bullseye|bookworm|trixie|forky|sid|oldstable|stable|testing|unstable)(-updates)?"
)
PACKAGE, PACKAGE_SUITE = "libonnxruntime-dev", "trixie"
WITHOUT = (
    "nothing else needs the library, models run with their model-local function; to build it, "
    "pass the include folder of an ONNX Runtime release with --headers or ORT_INCLUDE_DIR"
)


@dataclass(frozen=True)
class Headers:
    """A folder that holds `onnxruntime_cxx_api.h`."""

    folder: Path
    api: int  # its ORT_API_VERSION
    origin: str  # for people

    def __str__(self) -> str:
        return f"{self.folder} ({self.origin}, ORT_API_VERSION {self.api})"


class _Unavailable(Exception):
    """Why one way to the headers is closed."""


def runtime_api() -> int | None:
    """The API version of the installed onnxruntime (31 for 1.31.1); None without one."""
    try:
        import onnxruntime
    except ImportError:
        return None
    return int(onnxruntime.__version__.split(".")[1])


def read_headers(folder: Path, origin: str) -> Headers | None:
    """The headers in `folder`, in any of the known layouts."""
    for layout in LAYOUTS:
        place = folder / layout
        if not (place / HEADER).is_file() or not (place / "onnxruntime_cxx_api.h").is_file():
            continue
        text = (place / HEADER).read_text(errors="replace")
        if match := re.search(r"^#define ORT_API_VERSION (\d+)", text, re.MULTILINE):
            return Headers(place.resolve(), int(match[1]), origin)
    return None


def unfit(headers: Headers, runtime: int | None) -> str | None:
    """Why headers cannot serve a runtime of that API version, or None."""
    if headers.api < MINIMUM_API:
        return f"{headers} are older than API {MINIMUM_API}"
    if runtime is not None and headers.api > runtime:
        return f"{headers} are newer than the installed onnxruntime 1.{runtime}"
    return None


def find_headers(given: Path | None = None, say: Say = silent) -> Headers:
    """ONNX Runtime's C++ headers: given or ORT_INCLUDE_DIR, installed, cached, else obtained.

    Args:
        given: a folder that must hold them.
        say: called with a line on headers that are passed over.

    Raises:
        UserError: the given ones do not fit, or there are none and none can be obtained.
    """
    runtime = runtime_api()
    named = given or (os.environ.get("ORT_INCLUDE_DIR") or None)
    if named is not None:
        headers = read_headers(Path(named), "given")
        if headers is None:
            raise UserError(f"{named} holds no {HEADER}; {WITHOUT}")
        if reason := unfit(headers, runtime):
            raise UserError(f"{reason}; upgrade onnxruntime, or give the headers of its version")
        return headers
    for headers in present():
        if reason := unfit(headers, runtime):
            say(f"passed over: {reason}")
        else:
            return headers
    try:
        headers = _obtain(say)
    except _Unavailable as error:
        raise UserError(f"no ONNX Runtime headers here: {error}; {WITHOUT}") from None
    if reason := unfit(headers, runtime):
        raise UserError(f"{reason}; upgrade onnxruntime ({WITHOUT})")
    return headers


def present() -> list[Headers]:
    """The headers that are on this machine, installed before cached; some may not fit."""
    return [*installed(), *_cached()]


def installed() -> Iterator[Headers]:
    """The system's own headers."""
    for prefix in ("/usr/include", "/usr/local/include"):
        if headers := read_headers(Path(prefix), "installed"):
            yield headers


def _cached() -> list[Headers]:
    """What `_obtain` kept, the newest API first."""
    places = filter(usable_tree, cached("headers/api-*"))
    found = (read_headers(place, "cached") for place in places)
    return sorted(filter(None, found), key=lambda headers: -headers.api)


def _obtain(say: Say) -> Headers:
    """Take the headers out of Debian's package into the cache; the system stays as it is."""
    if missing := [tool for tool in ("apt-get", "dpkg-deb") if shutil.which(tool) is None]:
        raise _Unavailable(f"{' and '.join(missing)} not found, so Debian's cannot be taken either")
    keyring = next(filter(Path.is_file, KEYRINGS), None)
    if keyring is None:
        raise _Unavailable("Debian's archive keyring is not installed, so its are not trusted")
    mirrors = debian_mirrors(APT)
    if not mirrors:
        raise _Unavailable("the system's apt sources name no Debian mirror")
    place = make_cache_dir("headers")
    reasons = []
    for mirror in mirrors:
        say(f"taking {PACKAGE} ({PACKAGE_SUITE}) from {_without_password(mirror)}")
        with scratch("headers", place) as folder:
            try:
                headers = _download(mirror, keyring, folder)
                return _keep(headers, place / f"api-{headers.api}")
            except _Unavailable as error:
                if os.strerror(errno.ENOSPC) in str(error):
                    raise unfitting(folder) from error
                require_room(folder)  # apt then says that a signature is missing
                reasons.append(str(error))
    raise _Unavailable("; ".join(reasons))


def _keep(headers: Headers, target: Path) -> Headers:
    """Copy freshly unpacked headers to their place, whole or not at all."""
    try:
        with scratch("headers", target.parent) as folder:
            copy = shutil.copytree(headers.folder, folder / "copy")
            trusted.close_tree(copy)
            copy.rename(target)
    except OSError as error:
        # Another process may have been faster.
        if not usable_tree(target) or read_headers(target, "cached") is None:
            raise _Unavailable(f"cannot write {target} ({error.strerror or error})") from None
    return Headers(target, headers.api, f"Debian {PACKAGE}")


def _download(mirror: str, keyring: Path, scratch: Path) -> Headers:
    """Fetch and unpack the package with apt, which checks its signature; no root needed."""
    for folder in ("lists/partial", "cache/archives/partial"):
        (scratch / folder).mkdir(parents=True, exist_ok=True)
    source = scratch / "debian.list"
    source.write_text(f"deb [signed-by={keyring}] {mirror} {PACKAGE_SUITE} main\n")
    options = {
        "Dir::Etc::sourcelist": source,
        "Dir::Etc::sourceparts": "-",
        "Dir::State::lists": scratch / "lists",
        "Dir::Cache": scratch / "cache",
        "Acquire::Languages": "none",
        "APT::Update::Error-Mode": "any",  # else an unreachable mirror is only a warning
        "Acquire::Retries": 1,
        "Acquire::http::Timeout": 30,
        "Acquire::https::Timeout": 30,
    }
    apt = [
        "apt-get",
        "-q",
        *(word for key, value in options.items() for word in ("-o", f"{key}={value}")),
    ]
    _run([*apt, "update"], scratch)
    _run([*apt, "download", PACKAGE], scratch)
    (package,) = scratch.glob(f"{PACKAGE}_*.deb")
    _run(["dpkg-deb", "-x", str(package), str(scratch / "unpacked")], scratch)
    headers = read_headers(scratch / "unpacked/usr/include", f"Debian {PACKAGE}")
    if headers is None:
        raise _Unavailable(f"{package.name} holds none")
    return headers


def _run(command: list[str], folder: Path) -> None:
    try:
        done = subprocess.run(
            command, cwd=folder, env=os.environ | {"LC_ALL": "C"}, timeout=180,
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        raise _Unavailable(f"{command[0]} took more than three minutes") from None
    except OSError as error:
        raise _Unavailable(f"{command[0]} cannot run ({error.strerror})") from None
    if done.returncode != 0:
        errors = [line for line in done.stdout.splitlines() if line.startswith(("E:", "dpkg-deb:"))]
        reason = errors[0] if errors else f"exit code {done.returncode}"
        raise _Unavailable(f"{command[0]} failed ({reason[:160]})")


def _without_password(mirror: str) -> str:
    return re.sub(r"//[^/@]*@", "//", mirror)


def debian_mirrors(apt: Path) -> list[str]:
    """URIs of the Debian archives in the apt configuration folder `apt`, in order.

    Both forms are read: one-line `.list` and deb822 `.sources`.
    """
    parts = sorted((apt / "sources.list.d").glob("*")) if (apt / "sources.list.d").is_dir() else []
    mirrors: dict[str, None] = {}
    for file in [apt / "sources.list", *parts]:
        reader = {".list": _one_line_entries, ".sources": _deb822_entries}.get(file.suffix)
        if reader is None or not file.is_file() or not os.access(file, os.R_OK):
            continue
        for uri, suites, components in reader(file.read_text(errors="replace")):
            debian = any(map(SUITE.fullmatch, suites)) and "main" in components
            if debian and not uri.startswith("cdrom:"):
                mirrors[uri] = None
    return list(mirrors)


Entry = tuple[str, list[str], list[str]]  # URI, suites, components


def _one_line_entries(text: str) -> Iterator[Entry]:
    for line in text.splitlines():
        match = re.match(r"\s*deb\s+(?:\[[^\]]*\]\s*)?(\S+)\s+(\S+)([^#]*)", line)
        if match:
            yield match[1], [match[2]], match[3].split()


def _deb822_entries(text: str) -> Iterator[Entry]:
    lines = (line for line in text.splitlines() if not line.startswith("#"))
    for stanza in re.split(r"\n\s*\n", "\n".join(lines)):
        unfolded = re.sub(r"\n[ \t]+", " ", stanza)
        pairs = (line.partition(":") for line in unfolded.splitlines())
        fields = {key.strip().lower(): value.split() for key, _, value in pairs}
        enabled = (fields.get("enabled") or ["yes"])[0].lower()
        if "deb" in fields.get("types", []) and enabled in ("yes", "true", "1"):
            for uri in fields.get("uris", []):
                yield uri, fields.get("suites", []), fields.get("components", [])
