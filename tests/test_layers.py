"""Arrows between rooms point down; lazy imports and those for type checkers are counted too."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

import asvit_deploy

PACKAGE = Path(asvit_deploy.__file__).parent

# From the ground up: a room imports from its own row and from those before it. `runners.base`, the
# face of every runner, lies below parity, which judges runners; the others lie above it.
LAYERS: list[tuple[str, ...]] = [
    ("errors", "precision", "text"),
    ("disk",),
    (
        "bounded",
        "child",
        "claims",
        "intervals",
        "memory",
        "processor",
        "requirements",
        "runtimes",
        "similarity",
        "status",
        "trusted",
    ),
    ("files",),
    ("sealed", "sidecar"),
    ("ops",),
    ("graph",),
    ("reduction",),
    ("models",),
    ("checkpoints",),
    ("classes",),
    ("data",),
    ("runners.base",),
    ("parity",),
    ("runners",),
    ("artefacts",),
    ("budget", "distance"),
    ("calibration", "fitting"),
    ("per_picture", "scheduling"),
    ("settling",),
    ("choice",),
    ("drawing",),
    ("page",),
    ("answers",),
    ("bulk", "doctor", "engine", "evaluation", "exporting", "serving", "training"),
    ("tuning",),
    ("api",),
    ("__init__",),
    ("cli",),
    ("__main__",),
]

# Arrows that point up: importer, imported -> why.
KNOWN: dict[tuple[str, str], str] = {}


@dataclass(frozen=True)
class Arrow:
    """An import: modules without the package's name, and where it stands."""

    importer: str
    imported: str
    name: str
    line: int

    def __str__(self) -> str:
        return f"{self.importer}:{self.line} imports {self.imported}"


def modules_of(package: Path) -> dict[str, Path]:
    """Modules by their names without the package's; a folder is called by its own name."""
    found = {}
    for path in sorted(package.rglob("*.py")):
        parts = path.relative_to(package).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" and parts[:-1] else parts)] = path
    return found


def imports_of(path: Path) -> Iterator[tuple[str, str, int]]:
    """What a file imports, wherever it does so: module, name in it or "", line."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((alias.name, "", node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno} imports by dots"
            yield from ((str(node.module), alias.name, node.lineno) for alias in node.names)


def arrows_of(package: Path) -> list[Arrow]:
    """Every import of one module of the package by another."""
    modules, arrows = modules_of(package), []
    for importer, path in modules.items():
        for module, name, line in imports_of(path):
            if module.split(".")[0] != package.name:
                continue
            within = module.removeprefix(package.name).lstrip(".")
            inner = f"{within}.{name}".lstrip(".")
            if inner in modules:
                arrows.append(Arrow(importer, inner, "", line))
            else:
                arrows.append(Arrow(importer, within or "__init__", name, line))
    return arrows


def row_of(module: str, layers: list[tuple[str, ...]]) -> int:
    """The row of a module's room; a module that has a row of its own stands there."""
    for name in (module, module.split(".")[0]):
        for row, rooms in enumerate(layers):
            if name in rooms:
                return row
    raise AssertionError(f"{module} belongs to no layer; say in LAYERS where it stands")


def upward(arrows: list[Arrow], layers: list[tuple[str, ...]]) -> list[Arrow]:
    """Arrows to a higher row. The package itself may be asked for its version."""
    return [
        arrow
        for arrow in arrows
        if (arrow.imported, arrow.name) != ("__init__", "__version__")
        and row_of(arrow.imported, layers) > row_of(arrow.importer, layers)
    ]


def folder_cycle(arrows: list[Arrow]) -> list[str] | None:
    """Folders and single modules that import each other in a ring, or None."""
    targets: dict[str, set[str]] = {}
    for arrow in arrows:
        source, target = arrow.importer.split(".")[0], arrow.imported.split(".")[0]
        if source != target and "__init__" not in (source, target):
            targets.setdefault(source, set()).add(target)
    done: set[str] = set()

    def visit(room: str, trail: list[str]) -> list[str] | None:
        if room in trail:
            return [*trail[trail.index(room) :], room]
        if room in done:
            return None
        for target in sorted(targets.get(room, ())):
            if ring := visit(target, [*trail, room]):
                return ring
        done.add(room)
        return None

    return next((ring for room in sorted(targets) if (ring := visit(room, []))), None)


def is_known(arrow: Arrow) -> bool:
    return (arrow.importer, arrow.imported) in KNOWN


ARROWS = arrows_of(PACKAGE)


def test_arrows_point_down():
    assert len(ARROWS) > 400, "the imports were not found"
    found = upward(ARROWS, LAYERS)
    assert [str(arrow) for arrow in found if not is_known(arrow)] == []
    gone = set(KNOWN) - {(arrow.importer, arrow.imported) for arrow in found}
    assert gone == set(), "mended: take them out of KNOWN"


def test_no_folder_imports_itself_by_way_of_another():
    assert folder_cycle([arrow for arrow in ARROWS if not is_known(arrow)]) is None


def test_evaluation_is_for_commands_and_the_public_api():
    users = {arrow.importer.split(".")[0] for arrow in ARROWS
             if arrow.imported.split(".")[0] == "evaluation"}  # fmt: skip
    assert users <= {"api", "cli", "__init__", "evaluation", "tuning"}
    assert "cli" in users


def test_parity_knows_of_runners_their_face_only():
    from_runners = {arrow.imported for arrow in ARROWS if arrow.importer.startswith("parity")
                    and arrow.imported.startswith("runners")}  # fmt: skip
    assert from_runners == {"runners.base"}


@pytest.mark.parametrize("room", ["models", "reduction"])
def test_networks_know_no_onnx(room):
    paths = [path for name, path in modules_of(PACKAGE).items() if name.split(".")[0] == room]
    assert paths
    for path in paths:
        for module, name, line in imports_of(path):
            words = f"{module}.{name}".split(".")
            assert not any(word.startswith("onnx") for word in words), f"{path}:{line}"


def test_importing_the_package_is_not_running_a_command():
    assert not [arrow for arrow in ARROWS if arrow.imported.split(".")[0] == "__main__"]


# --- the finder itself ---------------------------------------------------------------------------


@pytest.fixture
def house(tmp_path):
    """Makes a package of the files given, and its arrows."""

    def build(files: dict[str, str]) -> list[Arrow]:
        package = tmp_path / "house"
        for name, text in {"__init__.py": "", **files}.items():
            path = package / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        return arrows_of(package)

    return build


@pytest.mark.parametrize("text", [
    "from house.top.a import x", "from house.top import a", "import house.top.a",
    "def f():\n    from house.top.a import x",
    "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from house.top.a import x",
    "class A:\n    def f(self):\n        if self:\n            import house.top.a as y",
])  # fmt: skip
def test_an_arrow_up_is_found_however_it_is_written(house, text):
    arrows = house({"ground/b.py": text, "top/a.py": "x = 1", "top/__init__.py": ""})
    (found,) = upward(arrows, [("ground",), ("top",), ("__init__",)])
    assert (found.importer, found.imported) == ("ground.b", "top.a")
    assert upward(arrows, [("top",), ("ground",), ("__init__",)]) == []


def test_a_ring_of_three_folders_is_found(house):
    arrows = house({
        "a/x.py": "def f():\n    import house.b.y", "b/y.py": "from house.c import z",
        "c/z.py": "from house.a.x import f", "d.py": "import house.a.x",
    })  # fmt: skip
    assert folder_cycle(arrows) == ["a", "b", "c", "a"]
    assert folder_cycle([arrow for arrow in arrows if arrow.importer != "c.z"]) is None


def test_the_version_alone_may_be_asked_of_the_package(house):
    layers = [("a", "b"), ("__init__",)]
    arrows = house({"__init__.py": "__version__ = '1'\nfrom house.a import f",
                    "a.py": "from house import __version__\ndef f(): ..."})  # fmt: skip
    assert upward(arrows, layers) == []
    (found,) = upward(house({"b.py": "from house import load"}), layers)
    assert (found.importer, found.name) == ("b", "load")


def test_a_room_without_a_layer_is_refused(house):
    arrows = house({"a.py": "import house.new.x", "new/x.py": ""})
    with pytest.raises(AssertionError, match=r"new\.x belongs to no layer"):
        upward(arrows, [("a",)])
