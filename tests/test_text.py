"""Nothing that a file says steers a terminal, and no message is without an end."""

from __future__ import annotations

import json

import pytest

from asvit_deploy.errors import CheckFailed, Interrupted, UserError
from asvit_deploy.text import MOST_LINE, one_line, printable, shortened

STEERING = {
    "escape": "\x1b[31m", "bell": "\a", "backspace": "\b", "delete": "\x7f", "C1": "\x9b31m",
    "right to left": "\u202e", "isolate": "\u2067", "Arabic mark": "\u061c", "no width": "\u200b",
    "byte order": "\ufeff", "a tag": "\U000e0041", "a line end": "\u2028", "half": "\udcff",
    "zero": "\0", "return": "\r", "soft hyphen": "\xad",
}  # fmt: skip


@pytest.mark.parametrize("name", STEERING)
@pytest.mark.parametrize("made", [UserError, CheckFailed, Interrupted, one_line, shortened])
def test_what_steers_a_terminal_is_written_out(name, made):
    text = str(made(f"a{STEERING[name]}b.pt is damaged; copy it again"))
    assert text.isprintable()
    assert text.startswith("a")
    assert "b.pt is damaged" in text


@pytest.mark.parametrize("text", ["Käse", "猫", "नमस्ते", "👨‍👩‍👧", "می‌خواهم", "a b", "\xa0"])
def test_words_of_any_script_stay(text):
    assert printable(text) == one_line(f"-{text}-")[1:-1] == text


@pytest.mark.parametrize("size", [2_000, 10**6, 10**8])
def test_a_long_value_leaves_both_ends_of_the_line(size):
    line = str(UserError(f"x.pt says arch {'y' * size}, which is none; write it again"))
    assert len(line) <= MOST_LINE
    assert line.startswith("x.pt says arch yyy")
    assert line.endswith("which is none; write it again")
    assert len(shortened("\x1b" * size)) < 1200


@pytest.mark.slow
def test_a_class_name_cannot_steer_the_terminal(cli, tmp_path, mini_artifacts, mini_config):
    """Nor a picture's; and `--json` says the same as without, in JSON."""
    from conftest import signed_copy
    from PIL import Image

    names = [f"\x1b]0;gone\a\u202e{i}\x7f\ud800" for i in range(mini_config.num_classes)]
    model = signed_copy(mini_artifacts["1", "auto"], tmp_path / "x.onnx", classes=names,
                        classes_from="\x1b[2J")  # fmt: skip
    picture = tmp_path / "a\x1b[31m\n.png"
    Image.new("RGB", (40, 40), "red").save(picture)
    shown = cli("predict", model, picture)
    assert shown.code == 0, shown.err
    assert all(line.isprintable() for line in (shown.out + shown.err).splitlines())
    said = cli("predict", model, picture, "--json")
    (answer,) = json.loads(said.out)
    assert {guess["label"] for guess in answer["top"]} <= set(names)
    assert answer["image"] == str(picture)
    assert all(line.isprintable() for line in said.out.splitlines())


def test_everything_printed_goes_through_one_function():
    import ast
    from pathlib import Path

    import asvit_deploy

    found = []
    for path in sorted((Path(asvit_deploy.__file__).parent / "cli").glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            called = node.func if isinstance(node, ast.Call) else None
            if isinstance(called, ast.Attribute) and called.attr in ("echo", "secho", "write"):
                name = getattr(called.value, "id", "")
                if name == "click" and path.name not in ("main.py", "options.py"):
                    found.append(f"{path.name}:{node.lineno}")
            elif isinstance(called, ast.Name) and called.id == "print":
                found.append(f"{path.name}:{node.lineno}")
    assert found == []
