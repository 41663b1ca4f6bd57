"""`hf-hub:NAME`: from a cache that the test makes, and from a small hub on this machine."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from hub_files import CONFIG, cached, sharded, vit_folder

from asvit_deploy.checkpoints.hub import folder_of, is_name
from asvit_deploy.errors import UserError

pytest.importorskip("huggingface_hub")
COMMIT = "c" * 40


def run(folder: Path, *arguments: object, **environment: object) -> subprocess.CompletedProcess:
    """A command in a process of its own: huggingface_hub reads its environment once."""
    keep = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "TRANSFORMERS_"))}
    own = {"HF_HOME": folder / "home", "HF_HUB_CACHE": folder / "cache",
           "HF_HUB_DISABLE_XET": 1, "HF_HUB_DISABLE_TELEMETRY": 1, **environment}  # fmt: skip
    return subprocess.run(
        [sys.executable, "-m", "asvit_deploy", *map(str, arguments)],
        env={**keep, **{key: str(value) for key, value in own.items()}},
        cwd=folder, capture_output=True, text=True, timeout=240,
    )  # fmt: skip


def refused(done: subprocess.CompletedProcess, *words: str) -> None:
    lines = [line for line in done.stderr.splitlines() if line.startswith("Error:")]
    assert (done.returncode, done.stdout, len(lines)) == (2, "", 1), done
    assert "Traceback" not in done.stderr
    for word in words:
        assert word in lines[0], lines[0]


# Nobody listens there.
NOWHERE = {"HF_ENDPOINT": "http://127.0.0.1:9", "NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1"}


@pytest.mark.slow
@pytest.mark.parametrize("make", [vit_folder, sharded])
def test_a_cache_serves_offline(make: Any, tmp_path: Path) -> None:
    cached(tmp_path / "cache", "someone/bird-vit", make=make)
    done = run(tmp_path, "export", "--ckpt", "hf-hub:someone/bird-vit", "--dense",
               HF_HUB_OFFLINE=1)  # fmt: skip
    assert (done.returncode, done.stdout.strip()) == (0, "bird-vit.dense.onnx"), done.stderr
    assert "hf-hub:someone/bird-vit: HF_HUB_OFFLINE is set, so its cached copy" in done.stderr
    fields = json.loads((tmp_path / "bird-vit.dense.onnx.json").read_text())
    assert fields["preprocessing"]["mean"] == [0.4] * 3
    assert fields["source"]["hub"] == {"repository": "someone/bird-vit", "revision": COMMIT}
    # Another machine has its cache elsewhere.
    (tmp_path / "cache").rename(tmp_path / "moved")
    checked = run(tmp_path, "check", "bird-vit.dense.onnx", "--limit", 2,
                  HF_HUB_CACHE=tmp_path / "moved", HF_HUB_OFFLINE=1)  # fmt: skip
    assert checked.returncode == 0, checked.stderr


@pytest.mark.slow
def test_a_cache_serves_where_the_hub_cannot_be_reached(tmp_path: Path) -> None:
    cached(tmp_path / "cache", "someone/bird-vit")
    done = run(tmp_path, "export", "--ckpt", f"hf-hub:someone/bird-vit@{COMMIT}", "--dense",
               **NOWHERE)  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "the hub cannot be reached" in done.stderr


@pytest.mark.slow
def test_without_network_and_cache(tmp_path: Path) -> None:
    name = "hf-hub:someone/bird-vit"
    for environment in (NOWHERE, {"HF_HUB_OFFLINE": 1}):
        done = run(tmp_path, "export", "--ckpt", name, "--dense", **environment)
        refused(done, name, str(tmp_path / "cache"), "go online")
    refused(run(tmp_path, "evaluate", name, "--data", "digits", HF_HUB_OFFLINE=1), name)
    refused(run(tmp_path, "calibrate", "--ckpt", name, HF_HUB_OFFLINE=1), name)
    refused(run(tmp_path, "finetune", "--data", "digits", "--pretrained", name, HF_HUB_OFFLINE=1),
            name)  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", ["hf-hub:a b", "hf-hub:a--b/c"])
def test_a_name_that_is_none(name: str, tmp_path: Path) -> None:
    refused(run(tmp_path, "export", "--ckpt", name, "--dense", **NOWHERE), "names no repository")


@pytest.mark.parametrize(
    "name",
    ["", "a/b/c", "../x", "a b", "a@", "a--b/c", "a/b.git", "-a/b", "a/b.", "a..b/c", "a\nb/c",
     "a" * 97, f"a/{'b' * 97}", "a" * 5000, f"a/{'b' * 5000}", f"a/b@{'c' * 5000}"],
)  # fmt: skip
def test_names_that_are_none(name: str) -> None:
    name = f"hf-hub:{name}"
    assert is_name(name)
    with pytest.raises(UserError, match=r"names no repository .*pass hf-hub:OWNER/NAME") as caught:
        folder_of(name)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 250


@pytest.mark.slow
@pytest.mark.parametrize("environment", [{"HF_HUB_OFFLINE": 1}, NOWHERE])
def test_a_cache_of_a_config_alone_is_no_copy(environment: dict, tmp_path: Path) -> None:
    snapshot = cached(tmp_path / "cache", "someone/bird-vit")
    (snapshot / "model.safetensors").unlink()
    (snapshot / "model.safetensors").symlink_to("../../blobs/gone")
    name = "hf-hub:someone/bird-vit"
    done = run(tmp_path, "export", "--ckpt", name, "--dense", **environment)
    refused(done, name, str(tmp_path / "cache"), "has no weights of it, only config.json, ",
            "go online")  # fmt: skip
    assert "cached copy is taken" not in done.stderr


@pytest.mark.slow
def test_without_huggingface_hub(tmp_path: Path) -> None:
    blocker = tmp_path / "blocked"
    blocker.mkdir()
    (blocker / "huggingface_hub.py").write_text(
        "raise ModuleNotFoundError('no', name='huggingface_hub')"
    )
    path = os.pathsep.join(filter(None, (str(blocker), os.environ.get("PYTHONPATH", ""))))
    done = run(tmp_path, "export", "--ckpt", "hf-hub:a/b", "--dense", PYTHONPATH=path)
    refused(done, "hf-hub:a/b needs huggingface_hub", "pip install", "huggingface")


class _Hub(BaseHTTPRequestHandler):
    """As much of the hub as its client asks for."""

    server: _Server

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def _answer(self, body: bool) -> None:
        path = self.path.split("?")[0]
        for repository, folder in self.server.repositories.items():
            if self.server.broken is not None:
                return self._send(self.server.broken[1], {}, body, self.server.broken[0])
            if path in (f"/api/models/{repository}", f"/api/models/{repository}/revision/main"):
                names = [{"rfilename": f.name} for f in sorted(folder.iterdir())]
                listing = {"id": repository, "sha": COMMIT, "siblings": names}
                return self._send(json.dumps(listing).encode(), {}, body)
            if path.startswith(f"/api/models/{repository}/revision/"):
                return self._send(b"", {"X-Error-Code": "RevisionNotFound"}, body, 404)
            stem = f"/{repository}/resolve/{COMMIT}/"
            if path.startswith(stem) and (folder / path.removeprefix(stem)).is_file():
                data = (folder / path.removeprefix(stem)).read_bytes()
                if body:
                    self.server.served.append(path.removeprefix(stem))
                tag = hashlib.sha256(data).hexdigest()
                return self._send(data, {"ETag": f'"{tag}"', "X-Repo-Commit": COMMIT}, body)
        self._send(b"", {"X-Error-Code": "RepoNotFound"}, body, 404)

    def _send(self, data: bytes, headers: dict[str, str], body: bool, status: int = 200) -> None:
        self.send_response(status)
        for key, value in {**headers, "Content-Length": str(len(data))}.items():
            self.send_header(key, value)
        self.end_headers()
        if body:
            self.wfile.write(data)


class _Server(ThreadingHTTPServer):
    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Hub)
        self.repositories: dict[str, Path] = {}
        self.served: list[str] = []
        self.broken: tuple[int, bytes] | None = None  # what it answers to everything

    @property
    def environment(self) -> dict[str, str]:
        return {**NOWHERE, "HF_ENDPOINT": f"http://127.0.0.1:{self.server_port}"}


@pytest.fixture
def hub() -> Iterator[_Server]:
    server = _Server()
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.mark.slow
@pytest.mark.parametrize(("make", "weights"), [
    (vit_folder, ["model.safetensors"]),
    (sharded, ["model.safetensors.index.json",
               *(f"model-{i:05d}-of-00003.safetensors" for i in (1, 2, 3))]),
])  # fmt: skip
def test_online_what_is_needed_is_downloaded(
    make: Callable[[Path], Path], weights: list[str], hub: _Server, tmp_path: Path
) -> None:
    folder = make(tmp_path / "remote")
    for name in ("pytorch_model.bin", "tf_model.h5", "README.md", "modeling.py", "optimizer.pt"):
        (folder / name).write_bytes(b"not wanted")
    hub.repositories["someone/bird-vit"] = folder
    name = "hf-hub:someone/bird-vit"
    done = run(tmp_path, "export", "--ckpt", name, "--dense", **hub.environment)
    assert done.returncode == 0, done.stderr
    assert f"{name}: revision cccccccccccc, {weights[0]}" in done.stderr
    assert sorted(hub.served) == sorted(["config.json", "preprocessor_config.json", *weights])
    hub.served.clear()  # and once more from the cache
    again = run(tmp_path, "export", "--ckpt", name, "--dense", "--force", **hub.environment)
    assert (again.returncode, hub.served) == (0, []), again.stderr


@pytest.mark.slow
def test_online_a_cache_of_a_config_alone_is_filled(hub: _Server, tmp_path: Path) -> None:
    hub.repositories["someone/bird-vit"] = vit_folder(tmp_path / "remote")
    (cached(tmp_path / "cache", "someone/bird-vit") / "model.safetensors").unlink()
    name = "hf-hub:someone/bird-vit"
    done = run(tmp_path, "export", "--ckpt", name, "--dense", **hub.environment)
    assert (done.returncode, "model.safetensors" in hub.served) == (0, True), done.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    ("answer", "words"),
    [
        ((403, b""), "the hub answers with HTTP 403"),
        ((200, b"<html>log in</html>"), "the hub's answer cannot be read (JSONDecodeError)"),
        ((200, b"[]"), "the hub's answer cannot be read"),
    ],
)
def test_a_hub_that_answers_otherwise(
    answer: tuple[int, bytes], words: str, hub: _Server, tmp_path: Path
) -> None:
    hub.repositories["someone/bird-vit"], hub.broken = tmp_path, answer
    name = "hf-hub:someone/bird-vit"
    refused(run(tmp_path, "export", "--ckpt", name, **hub.environment), name, words)
    cached(tmp_path / "cache", "someone/bird-vit")
    done = run(tmp_path, "export", "--ckpt", name, "--dense", **hub.environment)
    assert done.returncode == 0, done.stderr
    assert f"{name}: {words}" in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model_type": "swin"}, "a Swin"),
        ({"model_type": None, "architecture": "vit_base_patch16_siglip_224"}, "a SigLIP"),
        ({"image_size": [32, 64]}, "only square ones"),
    ],
)
def test_a_repository_of_another_network_costs_no_download(
    changes: dict, words: str, hub: _Server, tmp_path: Path
) -> None:
    config = {**CONFIG, **changes}
    hub.repositories["someone/other"] = vit_folder(tmp_path / "remote", config=config)
    done = run(tmp_path, "export", "--ckpt", "hf-hub:someone/other", "--dense", **hub.environment)
    refused(done, "hf-hub:someone/other", words)
    assert "model.safetensors" not in hub.served


@pytest.mark.slow
def test_repositories_and_revisions_that_are_not_there(hub: _Server, tmp_path: Path) -> None:
    hub.repositories["someone/bird-vit"] = vit_folder(tmp_path / "remote")
    gone = run(tmp_path, "export", "--ckpt", "hf-hub:someone/gone", **hub.environment)
    refused(gone, "hf-hub:someone/gone", "no such repository")
    lost = run(tmp_path, "export", "--ckpt", "hf-hub:someone/bird-vit@v9", **hub.environment)
    refused(lost, "no revision v9")
    (tmp_path / "remote" / "model.safetensors").unlink()
    empty = run(tmp_path, "export", "--ckpt", "hf-hub:someone/bird-vit", **hub.environment)
    refused(empty, "hf-hub:someone/bird-vit", "without weights")
