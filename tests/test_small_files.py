"""Pipes, devices and sockets where a file is due, and small files that are no such."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import raises_one_line

from asvit_deploy import sidecar as artifact
from asvit_deploy.artefacts import bundle
from asvit_deploy.bounded import MOST_TEXT, parse_json, read_bounded
from asvit_deploy.checkpoints.configs import sources_beside
from asvit_deploy.classes.name_files import read_names
from asvit_deploy.files import sha256
from asvit_deploy.training.presets import read_recipe

READERS = {
    "bounded": lambda path: read_bounded(path, 10, "note"),
    "digest": sha256,
    "classes": read_names,
    "recipe": read_recipe,
    "signed": lambda path: artifact.read_signed(path, "sidecar", "x", "kind"),
}


@pytest.mark.parametrize("reader", READERS)
def test_what_is_no_file_is_neither_opened_nor_waited_for(tmp_path, reader):
    pipe, link = tmp_path / "pipe", tmp_path / "link"
    os.mkfifo(pipe)
    link.symlink_to("/dev/zero")
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(tmp_path / "socket"))
        for path in (pipe, link, tmp_path / "socket", Path("/dev/zero")):
            raises_one_line(lambda path=path: READERS[reader](path), str(path), "no regular file")


@pytest.mark.slow
def test_a_pipe_in_place_of_any_input_is_one_line(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for name in ("a.onnx", "a.engine", "a.safetensors", "a.png", "a.txt", "a.toml", "a.onnx.json",
                 "data.tar"):  # fmt: skip
        (tmp_path / name).symlink_to("pipe")
    (tmp_path / "b.bucketed").mkdir()
    (tmp_path / "b.bucketed" / "manifest.json").symlink_to("../pipe")
    (tmp_path / "s").mkdir()
    (tmp_path / "s" / "0.tar").symlink_to("../pipe")
    commands = [
        ["check", "a.onnx"], ["check", "a.engine"], ["check", "b.bucketed"],
        ["check", "--reference", "a.onnx", "a.onnx"], ["build-engine", "a.onnx"],
        ["predict", "a.onnx", "a.png"], ["bench", "a.onnx"], ["evaluate", "a.onnx", "--data", "s"],
        ["export", "--ckpt", "a.safetensors"], ["export", "--ckpt", "default", "--images", "a.png"],
        ["export", "--ckpt", "default", "--classes", "a.txt"],
        ["calibrate", "--ckpt", "a.safetensors"], ["evaluate", "a.safetensors", "--data", "digits"],
        ["finetune", "--data", "s", "--arch", "as_deit_mini", "--dense", "--steps", "1"],
        ["finetune", "--data", "digits", "--recipe", "a.toml"],
        ["finetune", "--data", "digits", "--pretrained", "a.safetensors", "--steps", "1"],
    ]  # fmt: skip
    code = (
        "import json, sys\nfrom asvit_deploy.cli.main import main\n"
        "for args in json.loads(sys.argv[1]):\n"
        "    try:\n        main(args)\n"
        "    except SystemExit as end:\n        print(args, end.code, file=sys.stderr)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, json.dumps(commands)], cwd=tmp_path, capture_output=True,
        text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    ended = [line for line in done.stderr.splitlines() if line.startswith("[")]
    assert len(ended) == len(commands), done.stderr
    assert all(line.endswith(" 2") for line in ended), done.stderr


def test_a_small_file_that_is_not_small_is_not_read(tmp_path):
    path = tmp_path / "config.json"
    with open(path, "wb") as file:
        file.truncate(1 << 40)
    raises_one_line(lambda: read_names(path), "too many for a file of class names")
    raises_one_line(lambda: read_recipe(path), "too many for a TOML file")
    raises_one_line(lambda: artifact.read_signed(path, "sidecar", "x"), "too many for a sidecar")
    (tmp_path / "model.safetensors").touch()
    raises_one_line(lambda: sources_beside(tmp_path / "model.safetensors"), "too many for a config")
    path.rename(tmp_path / bundle.MANIFEST)
    raises_one_line(lambda: bundle.read(tmp_path), "too many for a manifest")


@pytest.mark.parametrize(
    "content",
    ["[" * 1_000_000, '{"a":' * 100_000, "9" * 10_000_000, '{"schema": ' + "9" * 10**6 + "}",
     "[" + "9" * 4301 + "]"],
)  # fmt: skip
def test_json_that_is_deep_or_long_is_one_line(tmp_path, content):
    with pytest.raises(ValueError, match=r"deep|digits"):
        parse_json(content)
    path = tmp_path / "model.json"
    path.write_text(content)
    raises_one_line(lambda: artifact.read_signed(path, "sidecar", "x"), "is not a sidecar")
    raises_one_line(lambda: read_names(path), str(path))


@pytest.mark.parametrize(
    "content",
    ["lr = " + "[" * 8000, "lr = " + "[" * 4000 + "]" * 4000, "lr = " + "{a=" * 5000,
     "[" + "[" * 8000],
)  # fmt: skip
def test_a_recipe_that_is_deep_is_one_line(tmp_path, content):
    path = tmp_path / "r.toml"
    path.write_text(content)
    raises_one_line(lambda: read_recipe(path), f"{path} is no TOML")


def test_nothing_is_written_that_could_not_be_read(tmp_path):
    names = [f"{i:05}" + "x" * 900 for i in range(20_000)]
    raises_one_line(lambda: artifact.write(tmp_path / "a.onnx", b"x", {"classes": names}),
                    "shorten the class names")  # fmt: skip
    assert not list(tmp_path.iterdir())
    assert len(artifact.signed({"classes": [f"class {i}, a name" for i in range(22_000)]})) < (
        MOST_TEXT // 10
    )


@pytest.mark.slow
def test_a_recipe_of_one_endless_key(ends, tmp_path):
    code = "from asvit_deploy.training.presets import read_recipe; read_recipe(path)"
    path = tmp_path / "r.toml"
    path.write_text("a." * 10**5 + "b = 1\n")
    assert "too many for a TOML file" in ends(code, path)
    for text in ("a." * 8_000 + "b = 1", "lr." + "a." * 8_000 + "b = 1", "[" + "a." * 8_000):
        path.write_text(text)
        assert ends(code, path).startswith(str(path))


@pytest.mark.slow
def test_a_list_of_classes_with_a_name_twice_far_down(ends, tmp_path):
    code = "from asvit_deploy.classes.name_files import read_names; read_names(path)"
    path = tmp_path / "classes.txt"
    path.write_text("".join(f"class {i}\n" for i in range(10**6)) + "class 5\n")
    assert "twice, as number 5 and 1000000" in ends(code, path)
    path.write_text(json.dumps({str(i): f"class {i}" for i in range(3 * 10**5)} | {"7": "class 6"}))
    assert "twice" in ends(code, path)


@pytest.mark.slow
def test_a_log_of_one_endless_line_is_another_file(ends, tmp_path):
    code = (
        "from asvit_deploy.training.log import Log; Log(path, {}, 3, False)"
    )  # fmt: skip
    path = tmp_path / "x.log.jsonl"
    path.write_bytes(b"[" * (300 << 20))
    assert "exists already" in ends(code, path, 64)


def sized(path: Path, size: int) -> Path:
    """A file that holds nothing, of that size."""
    with open(path, "wb") as file:
        file.truncate(size)
    return path


SIGNED = {"sha256": "0" * 64, "kind": "onnx"}
TERABYTES = {
    "x.onnx": "from asvit_deploy.sidecar import read; read(path)",
    "x.engine": "from asvit_deploy.sidecar import read; read(path)",
    "x.pt": "from asvit_deploy.checkpoints.load import load_checkpoint; load_checkpoint(path)",
    "x.safetensors": (
        "from asvit_deploy.checkpoints.load import load_checkpoint; load_checkpoint(path)"
    ),
    "x.unfinished.pt": "from asvit_deploy.training.state import load_state\n"
                       "    load_state(path, None, {})",
}  # fmt: skip


@pytest.mark.parametrize("name", TERABYTES)
def test_a_file_of_a_terabyte_is_not_read(ends, tmp_path, name):
    path = sized(tmp_path / name, 1 << 40)
    artifact.sidecar_path(path).write_text(artifact.signed(SIGNED))
    if name.endswith("pt"):  # one that torch.save would write, all of it zeros
        _sparse_archive(path, 1 << 40)
    if name == "x.safetensors":
        entries = {"a": {"dtype": "U8", "shape": [1 << 40], "data_offsets": [0, 1 << 40]}}
        header = json.dumps(entries).encode()
        with open(path, "r+b") as file:
            file.write(len(header).to_bytes(8, "little") + header)
            file.truncate((1 << 40) + len(header) + 8)
    said = ends(TERABYTES[name], path, 64)
    assert said.startswith(f"{path} has 1,099,5")
    assert "bytes, more than" in said


def _sparse_archive(path: Path, size: int) -> None:
    """A zip file as torch.save writes it with a storage of so many bytes, none of them on disk."""
    import zipfile

    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a/data.pkl", b"\x80\x02}.")
        archive.writestr("a/version", b"3\n")
        info = zipfile.ZipInfo("a/data/0")
        archive.writestr(info, b"")
        info.CRC, info.file_size, info.compress_size = 1, size, size
        archive.start_dir = archive.fp.seek(size, os.SEEK_CUR)  # type: ignore[union-attr]


def test_a_folder_of_stages_that_are_large_together_is_not_hashed(ends, tmp_path):
    names = [f"{i}.engine" for i in range(5)]
    for name in names:
        sized(tmp_path / name, 1 << 30)
    fields = {"kind": "bucketed", "files": dict.fromkeys(names, "0" * 64)}
    (tmp_path / bundle.MANIFEST).write_text(artifact.signed(fields))
    code = "from asvit_deploy.artefacts.bundle import read; read(path)"
    assert "have 5,368,709,120 bytes, more than" in ends(code, tmp_path, 64)


@pytest.mark.slow
def test_a_sources_size_does_not_have_a_folder_hashed(ends, tmp_path):
    for i in range(60):
        sized(tmp_path / f"{i}.bin", 1 << 30)
    code = (
        "from asvit_deploy.artefacts.reference import source_file\n"
        "    source_file(path / 'x.onnx', {'path': 'gone.pt', 'sha256': '0', 'size': 1 << 30},\n"
        "                'checkpoint', 'export')"
    )
    assert "is gone; put it back" in ends(code, tmp_path, 64)


@pytest.mark.slow
def test_the_largest_file_is_hashed_in_time(ends, tmp_path):
    from asvit_deploy.bounded import MOST_BYTES

    code = "from asvit_deploy.files import sha256; sha256(path)"
    assert ends(code, sized(tmp_path / "x.pt", MOST_BYTES), 64) == "fine"
    assert "more than the" in ends(code, sized(tmp_path / "x.pt", MOST_BYTES + 1), 64)
