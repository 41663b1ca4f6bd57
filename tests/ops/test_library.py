"""The C++ library in ONNX Runtime, and how it is built, found and refused."""

from __future__ import annotations

import functools
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from asvit_deploy import child
from asvit_deploy.cli.main import main
from asvit_deploy.errors import UserError
from asvit_deploy.ops import headers as headers_module
from asvit_deploy.ops import library as library_module
from asvit_deploy.ops import onnx_op
from asvit_deploy.ops.headers import Headers, debian_mirrors, find_headers
from asvit_deploy.ops.library import build_ort, check_library, compile_library, find_compiler
from asvit_deploy.ops.reference import threshold_compact

ort = pytest.importorskip("onnxruntime")

ROOT = Path(__file__).resolve().parents[2]
TYPES = {
    "float": (TensorProto.FLOAT, np.float32),
    "float16": (TensorProto.FLOAT16, np.float16),
    "bfloat16": (TensorProto.BFLOAT16, ml_dtypes.bfloat16),
}
SHAPES = [
    (1, 2, 64), (1, 3, 65), (1, 197, 384), (1, 577, 768), (2, 9, 64), (3, 197, 192),
    (5, 50, 96), (8, 2, 128), (8, 33, 64), (8, 577, 64), (2, 5, 0),
]  # fmt: skip
INF, NAN = float("inf"), float("nan")


@pytest.fixture(scope="session")
def library(ort_headers: Headers) -> Path:
    return build_ort(ort_headers.folder)


# ---------------------------------------------------------------- the op in ONNX Runtime


def node(suffix: str = "", tokens: str = "tokens", compact: str = "compact") -> onnx.NodeProto:
    outputs = [f"{name}{suffix}" for name in (compact, *onnx_op.OUTPUTS[1:])]
    return helper.make_node(
        onnx_op.OP_TYPE, [tokens, f"scores{suffix}", "threshold"], outputs,
        domain=onnx_op.DOMAIN, **onnx_op.PLUGIN_ATTRIBUTES,
    )  # fmt: skip


def model_of(nodes, inputs, outputs, functions=()) -> bytes:
    """A model of those nodes; inputs and outputs are {name: (type, shape)}."""
    infos = [
        [helper.make_tensor_value_info(name, *kind) for name, kind in group.items()]
        for group in (inputs, outputs)
    ]
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid(onnx_op.DOMAIN, 1)]
    graph = helper.make_graph(nodes, "op", *infos)
    return helper.make_model(
        graph, opset_imports=opsets, ir_version=10, functions=functions
    ).SerializeToString()


def one_node(kind: int, shape=("B", "M", "D"), functions=()) -> bytes:
    """tokens, scores, threshold -> the op's outputs. bfloat16 enters and leaves as float, exactly:
    numpy arrays of that type cannot be given to ONNX Runtime.
    """
    nodes = [node()]
    outside = kind
    if kind == TensorProto.BFLOAT16:
        outside = TensorProto.FLOAT
        nodes = [
            helper.make_node("Cast", ["tokens"], ["narrow"], to=kind),
            node(tokens="narrow", compact="narrow_compact"),
            helper.make_node("Cast", ["narrow_compact"], ["compact"], to=outside),
        ]
    scalar = {"threshold": (TensorProto.FLOAT, [])}
    inputs = {"tokens": (outside, shape), "scores": (TensorProto.FLOAT, ["B", "N"]), **scalar}
    integers = dict.fromkeys(onnx_op.OUTPUTS[1:], (TensorProto.INT64, None))
    return model_of(nodes, inputs, {"compact": (outside, None), **integers}, functions)


def session_of(model: bytes, library: Path | None) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 4
    if library is not None:
        options.register_custom_ops_library(str(library))
    return ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])


cached_session = functools.cache(lambda kind, library: session_of(one_node(kind), library))


def run(session: ort.InferenceSession, tokens, scores, threshold) -> list[np.ndarray]:
    values = tokens, scores, np.array(threshold, np.float32)
    return session.run(None, dict(zip(onnx_op.INPUTS, values, strict=True)))


def scores_like(name: str, shape: tuple[int, int], rng: np.random.Generator) -> np.ndarray:
    scores = rng.random(shape, dtype=np.float32)
    if name == "ties":
        return np.floor(scores * 4) / 4
    if name == "equal":
        return np.full(shape, 0.5, np.float32)
    special = {"NaN": [NAN], "all NaN": [NAN], "inf": [INF, -INF], "padded": [-INF]}.get(name, [])
    share = 1.0 if name == "all NaN" else 0.4
    for value in special:
        scores[rng.random(shape) < share] = value
    if name == "NaN and -inf":
        scores = np.where(scores < 0.5, np.float32(NAN), np.float32(-INF))
    return scores


CASES = {
    "about 70 % kept": ("plain", 0.3),
    "K = 1": ("plain", 2.0),
    "K = N": ("plain", -1.0),
    "ties, threshold equals a score": ("ties", 0.5),
    "all equal the threshold": ("equal", 0.5),
    "NaN scores": ("NaN", 0.5),
    "NaN scores, nothing passes": ("NaN", 2.0),
    "all scores NaN": ("all NaN", 0.0),
    "NaN and -inf": ("NaN and -inf", 0.0),
    "scores of inf": ("inf", 0.5),
    "pads of -inf": ("padded", -1.0),
    "threshold inf": ("inf", INF),
    "threshold -inf": ("inf", -INF),
    "threshold NaN": ("plain", NAN),
}


@pytest.mark.parametrize("prefix", [1, 2, 5])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("kind", TYPES)
def test_equals_the_oracle_bit_for_bit(library, kind, case, prefix):
    """The payload is copied and nothing is rounded, so equal means equal bits."""
    code, dtype = TYPES[kind]
    rng = np.random.default_rng(sum(map(ord, case)))
    name, threshold = CASES[case]
    for images, rows, width in SHAPES:
        shape = (images, rows + prefix - 1, width)
        tokens = rng.standard_normal(shape, dtype=np.float32).astype(dtype)
        scores = scores_like(name, (images, rows - 1), rng)
        given = tokens.astype(np.float32) if kind == "bfloat16" else tokens
        result = run(cached_session(code, library), given, scores, threshold)
        wanted = threshold_compact(tokens, scores, threshold)
        result[0] = result[0].astype(dtype)
        for field, mine, right in zip(wanted._fields, result, wanted, strict=True):
            assert mine.shape == right.shape, (shape, field)
            assert mine.tobytes() == right.tobytes(), (shape, field)


@pytest.mark.parametrize("kind", ["float", "float16"])
def test_payload_bits_pass_unchanged(library, kind):
    """Signalling NaNs and negative zeros are data here."""
    code, dtype = TYPES[kind]
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 256, (3, 17, 64 * np.dtype(dtype).itemsize), np.uint8).view(dtype)
    scores = rng.random((3, 16), dtype=np.float32)
    result = run(cached_session(code, library), tokens, scores, 0.5)
    assert result[0].tobytes() == threshold_compact(tokens, scores, 0.5).compact.tobytes()


def test_many_runs_of_one_session_give_each_its_own_result(library):
    session = cached_session(TensorProto.FLOAT, library)
    rng = np.random.default_rng(1)
    for _ in range(200):
        shape = tuple(int(size) for size in rng.integers((1, 2, 1), (9, 40, 65)))
        tokens = rng.standard_normal(shape, dtype=np.float32)
        scores = rng.random((shape[0], shape[1] - rng.integers(1, shape[1])), dtype=np.float32)
        threshold = float(rng.random() * 1.2 - 0.1)
        wanted = threshold_compact(tokens, scores, threshold)
        for mine, right in zip(run(session, tokens, scores, threshold), wanted, strict=True):
            np.testing.assert_array_equal(mine, right)


@pytest.mark.parametrize(
    ("tokens", "scores", "threshold", "message"),
    [
        ((0, 5, 3), (0, 4), (), "the batch is empty"),
        ((0, 1, 3), (0, 0), (), "the batch is empty"),
        ((2, 1, 3), (2, 0), (), "fewer than two rows"),
        ((2, 0, 3), (2, 0), (), "fewer than two rows"),
        ((2, 5, 3), (2, 5), (), "scores must be [B, M-P] for tokens [B, M, D], and P"),
        ((2, 5, 3), (2, 6), (), "scores must be [B, M-P] for tokens [B, M, D], and P"),
        ((2, 5, 3), (2, 0), (), "scores has no columns"),
        ((2, 5, 3), (1, 4), (), "scores must be [B, M-P]"),
        ((2, 5, 3), (2,), (), "scores must be [B, M-P]"),
        ((2, 5, 3), (2, 2, 2), (), "scores must be [B, M-P]"),
        ((5, 3), (5, 2), (), "tokens must be [B, M, D]"),
        ((2, 5, 3), (2, 4), (2,), "threshold must be one number"),
        ((2, 5, 3), (2, 4), (0,), "threshold must be one number"),
    ],
)
def test_refuses_what_the_contract_refuses(library, tokens, scores, threshold, message):
    unshaped = dict.fromkeys(onnx_op.INPUTS, (TensorProto.FLOAT, None))
    outputs = dict.fromkeys(onnx_op.OUTPUTS[1:], (TensorProto.INT64, None))
    outputs["compact"] = (TensorProto.FLOAT, None)
    session = session_of(model_of([node()], unshaped, outputs), library)
    with pytest.raises(Exception, match=re.escape(message)):
        run(
            session, np.zeros(tokens, np.float32), np.zeros(scores, np.float32), np.zeros(threshold)
        )


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("shape", [None, (None, None, None), ("B", "M", 64), (2, 9, 64)])
def test_shapes_are_inferred_as_far_as_they_are_known(library, kind, shape):
    outputs = session_of(one_node(TYPES[kind][0], shape), library).get_outputs()
    shapes = {output.name: output.shape for output in outputs}
    if shape is None:
        # ONNX Runtime's way to say that it does not know.
        assert shapes == {"compact": [], "index": [], "length": [], "size": []}
        return
    batch, rows, width = shapes["compact"]
    assert shapes["index"] == shapes["compact"][:2]
    assert shapes["length"] == [batch]
    assert shapes["size"] == []
    unknown = [rows]  # how many rows stay is known of no shape
    for given, inferred in ((shape[0], batch), (shape[2], width)):
        if given is None:
            unknown.append(inferred)
        else:
            assert inferred == given
    assert all(re.fullmatch(r"asvit_\d+", name) for name in unknown), shapes
    assert len(set(unknown)) == len(unknown), "one name would say that they are equal"


def test_stages_do_not_share_the_name_of_their_size(library):
    """ONNX Runtime lets tensors of equal named sizes share a buffer; stages differ in K."""
    number = (TensorProto.FLOAT, ["B", None])
    inputs = {"tokens": (TensorProto.FLOAT, ["B", "M", 8]), "threshold": (TensorProto.FLOAT, [])}
    nodes = [node("_0"), node("_1", tokens="compact_0")]
    outputs = {f"compact_{stage}": (TensorProto.FLOAT, None) for stage in (0, 1)}
    model = model_of(nodes, {**inputs, "scores_0": number, "scores_1": number}, outputs)
    first, second = session_of(model, library).get_outputs()
    assert first.shape[0] == second.shape[0] == "B"
    assert first.shape[1] != second.shape[1]


def test_registered_library_takes_over_the_function(library):
    """Shown with a function that does something else on purpose."""
    wrong = onnx.parser.parse_function(
        f'<domain: "{onnx_op.DOMAIN}", opset_import: ["": 20]>\n{onnx_op.OP_TYPE} '
        f"<{', '.join(onnx_op.PLUGIN_ATTRIBUTES)}> ({', '.join(onnx_op.INPUTS)}) => "
        "(compact, index, length, size) {\n"
        "compact = Neg (tokens)\nlength = Shape (tokens)\n"
        "index = Shape (scores)\nsize = Shape (length)\n}"
    )
    model = one_node(TensorProto.FLOAT, functions=[wrong])
    tokens, scores = np.ones((1, 3, 2), np.float32), np.ones((1, 2), np.float32)
    assert (run(session_of(model, None), tokens, scores, 0.0)[0] == -1).all()
    assert (run(session_of(model, library), tokens, scores, 0.0)[0] == 1).all()


def test_library_serves_several_sessions_and_is_let_go(library):
    for _ in range(5):
        sessions = [session_of(one_node(code), library) for code, _ in TYPES.values()]
        assert (
            len(run(sessions[0], np.ones((1, 2, 4), np.float32), np.ones((1, 1), np.float32), 0))
            == 4
        )


# ---------------------------------------------------------------- the file


def test_is_not_linked_to_onnx_runtime(library):
    if shutil.which("nm") is None:
        pytest.skip("nm is not installed")
    symbols = subprocess.run(["nm", "-D", str(library)], capture_output=True, text=True).stdout
    assert re.search(r" T RegisterCustomOps\b", symbols)
    assert not re.search(r" U \w*Ort", symbols)


def test_usable_library_has_no_reason_against_it(library):
    assert check_library(library) is None


@pytest.mark.parametrize("content", [b"", b"not a library\n", b"\x7fELF" + bytes(200)])
def test_file_that_is_no_library_is_named_so(tmp_path, content):
    file = tmp_path / "some.so"
    file.write_bytes(content)
    reason = check_library(file)
    assert reason is not None
    assert "\n" not in reason
    assert re.search("not a shared library|ONNX Runtime cannot load it", reason)


def test_cut_library_is_refused(library, tmp_path):
    file = tmp_path / "cut.so"
    file.write_bytes(library.read_bytes()[:20_000])
    assert check_library(file)


def test_missing_file_is_named_so(tmp_path):
    assert check_library(tmp_path / "none.so") == "there is no such file"


def compiled(tmp_path: Path, text: str) -> Path:
    (tmp_path / "other.cc").write_text(text)
    command = [*find_compiler(), "-shared", "-fPIC", "other.cc", "-o", "other.so"]
    subprocess.run(command, cwd=tmp_path, check=True)
    return tmp_path / "other.so"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("int answer() { return 42; }", "it is a library, but not of ONNX Runtime ops"),
        (
            'extern "C" void* RegisterCustomOps(void*, void*) { return nullptr; }',
            "it does not hold asvit::ThresholdCompact",
        ),
        (
            '#include <cstdlib>\nextern "C" void* RegisterCustomOps(void*, void*) { abort(); }',
            "loading it ends the process (SIGABRT)",
        ),
        (
            "#include <unistd.h>\n__attribute__((constructor)) static void c() "
            "{ fork(); for (;;) pause(); }",
            "loading it does not end within 3 s",
        ),
        (
            "#include <cstdio>\n__attribute__((constructor)) static void c() "
            '{ for (;;) puts("for ever and ever"); }',
            "loading it does not end within 3 s",
        ),
    ],
    ids=["no ops", "other ops", "crash", "wait", "endless talk"],
)
def test_other_library_is_named_so(ort_headers, tmp_path, monkeypatch, text, reason):
    if "does not end" in reason:
        monkeypatch.setattr(child, "PATIENCE", 3)
    assert check_library(compiled(tmp_path, text)) == reason


@pytest.fixture(scope="session")
def future(ort_headers: Headers, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The headers, of an API that no ONNX Runtime has yet."""
    folder = tmp_path_factory.mktemp("future") / "include"
    shutil.copytree(ort_headers.folder, folder)
    file = folder / headers_module.HEADER
    text = file.read_text().replace(f"ORT_API_VERSION {ort_headers.api}", "ORT_API_VERSION 999")
    file.write_text(text)
    return folder


@pytest.mark.slow
def test_library_for_another_onnx_runtime_is_named_so(future, tmp_path):
    compile_library(find_compiler(), Headers(future, 999, "future"), tmp_path / "future.so")
    assert check_library(tmp_path / "future.so") == (
        "it was built for another ONNX Runtime: this custom op library needs ONNX Runtime API 999, "
        f"which ONNX Runtime {ort.__version__} lacks"
    )


# ---------------------------------------------------------------- the build


def one_line(error: pytest.ExceptionInfo) -> str:
    assert "\n" not in str(error.value)
    return str(error.value)


def test_headers_newer_than_the_runtime_are_refused(future):
    with pytest.raises(UserError, match=r"API_VERSION 999\) are newer than the installed") as e:
        build_ort(future)
    one_line(e)


def test_headers_older_than_the_code_are_refused(ort_headers, tmp_path):
    for name in (headers_module.HEADER, "onnxruntime_cxx_api.h"):
        (tmp_path / name).write_text("#define ORT_API_VERSION 9\n")
    with pytest.raises(UserError, match="older than API") as error:
        build_ort(tmp_path)
    one_line(error)


def test_named_folder_without_headers_is_refused(ort_headers, tmp_path, monkeypatch):
    monkeypatch.setenv("ORT_INCLUDE_DIR", str(tmp_path))
    with pytest.raises(UserError, match=f"{tmp_path} holds no onnxruntime_c_api.h") as error:
        build_ort(force=True)
    assert "model-local function" in one_line(error)


@pytest.mark.parametrize("layout", ["", "onnxruntime", "onnxruntime/core/session", "include"])
def test_headers_are_found_in_every_layout(ort_headers, tmp_path, monkeypatch, layout):
    shutil.copytree(ort_headers.folder, tmp_path / layout, dirs_exist_ok=True)
    monkeypatch.setenv("ORT_INCLUDE_DIR", str(tmp_path))
    assert find_headers() == Headers((tmp_path / layout).resolve(), ort_headers.api, "given")


def test_without_headers_and_apt_one_line_says_what_goes_on(tmp_path, monkeypatch):
    if list(headers_module.installed()):
        pytest.skip("headers are installed on this system")
    (tmp_path / "g++").symlink_to("/bin/true")
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for name in ("CXX", "ORT_INCLUDE_DIR"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(UserError, match="no ONNX Runtime headers here: apt-get and dpkg-deb") as e:
        build_ort()
    assert "model-local function" in one_line(e)
    assert library_module.find_library() is None


def test_without_compiler_one_line_says_what_goes_on(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(UserError, match="neither g\\+\\+ nor clang\\+\\+ found") as error:
        build_ort()
    assert "model-local function" in one_line(error)
    monkeypatch.setenv("CXX", "no-such-compiler -v")
    with pytest.raises(UserError, match="CXX=no-such-compiler is no program"):
        build_ort()
    monkeypatch.setenv("CXX", "g++ '")
    with pytest.raises(UserError, match=r"CXX=g\+\+ ' is no command \(No closing quotation\)"):
        build_ort()


def test_compiler_that_cannot_be_run_is_blamed_itself(ort_headers, tmp_path, monkeypatch):
    script = tmp_path / "cxx"
    script.write_text("#!/no/such/interpreter\n")
    script.chmod(0o755)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("CXX", str(script))
    with pytest.raises(UserError, match=r"cxx cannot compile .*it cannot be run: No such") as error:
        build_ort(ort_headers.folder, cuda=False)
    assert "XDG_CACHE_HOME" not in one_line(error)


def test_failed_build_keeps_the_library_that_was_there(ort_headers, library, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    cached = library_module.library_path(ort_headers.api)
    cached.parent.mkdir()
    shutil.copy(library, cached)
    monkeypatch.setenv("CXX", "false")
    with pytest.raises(UserError, match="false cannot compile") as error:
        build_ort(ort_headers.folder, force=True)
    one_line(error)
    assert cached.read_bytes() == library.read_bytes()
    assert [path.name for path in cached.parent.iterdir()] == [cached.name]


def test_unwritable_cache_is_named(ort_headers, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(UserError, match="set XDG_CACHE_HOME to a writable folder") as error:
        build_ort(ort_headers.folder)
    one_line(error)


def test_cache_is_found_again_and_a_stale_build_is_not(library, tmp_path, monkeypatch):
    assert library_module.find_library() == library
    monkeypatch.setattr(library_module, "FLAGS", (*library_module.FLAGS, "-g"))
    assert library_module.find_library() is None


def test_debian_mirrors_are_read_from_both_kinds_of_sources(tmp_path):
    (tmp_path / "sources.list.d").mkdir()
    (tmp_path / "sources.list").write_text(
        "# deb http://comment.example/mirror trixie main\n"
        "deb cdrom:[Debian 13]/ trixie main\n"
        "deb-src http://source.example/mirror trixie main\n"
        "deb [arch=amd64 signed-by=/some.gpg] http://one.example/mirror bookworm main # x\n"
        "deb http://one.example/security bookworm-security main\n"
        "deb http://third-party.example/apt stable non-free\n"
        "deb http://ubuntu.example/ubuntu noble main\n"
    )
    (tmp_path / "sources.list.d" / "debian.sources").write_text(
        "Types: deb deb-src\n# a comment\n"
        "URIs: http://two.example/mirror\n  http://three.example/mirror\n"
        "Suites: trixie trixie-updates\nComponents: main\n\n"
        "Types: deb\nURIs: http://off.example/mirror\n"
        "Suites: trixie\nComponents: main\nEnabled: no\n"
        "\n\nTypes: deb\nURIs: http://safe.example/s\nSuites: trixie-security\nComponents: main\n"
    )
    (tmp_path / "sources.list.d" / "old.list.disabled").write_text("deb http://x/ trixie main\n")
    assert debian_mirrors(tmp_path) == [
        "http://one.example/mirror", "http://two.example/mirror", "http://three.example/mirror",
    ]  # fmt: skip
    assert debian_mirrors(tmp_path / "nowhere") == []


# ---------------------------------------------------------------- the command


def test_command_prints_the_path_alone_on_stdout(library, capsys):
    with pytest.raises(SystemExit) as end:
        main(["build-plugins", "ort"])
    assert end.value.code == 0
    assert capsys.readouterr().out == f"{library_module.find_library()}\n"


@pytest.mark.slow
def test_builds_from_an_installed_wheel(ort_headers, tmp_path):
    pytest.importorskip("hatchling")
    pip = [sys.executable, "-m", "pip", "-q", "--disable-pip-version-check"]
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)]
    subprocess.run(build, cwd=ROOT, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    site = tmp_path / "site"
    subprocess.run([*pip, "install", "--no-deps", "--target", site, wheel], check=True)
    env = os.environ | {
        "PYTHONPATH": str(site),
        "XDG_CACHE_HOME": str(tmp_path / "cache"),
        "ORT_INCLUDE_DIR": str(ort_headers.folder),
    }
    command = [sys.executable, "-m", "asvit_deploy", "build-plugins", "ort"]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    built = Path(done.stdout.strip())
    assert built.parent == tmp_path / "cache" / "asvit-deploy"
    assert str(ort_headers.folder) in done.stderr
    assert check_library(built) is None
    ask = "from asvit_deploy.ops.library import sources_dir; print(sources_dir())"
    answer = subprocess.check_output([sys.executable, "-c", ask], cwd=tmp_path, env=env, text=True)
    assert Path(answer.strip()) == site / "asvit_deploy" / "_cpp" / "plugins"


@pytest.mark.slow
def test_builds_with_cmake(ort_headers, tmp_path):
    if shutil.which("cmake") is None:
        pytest.skip("cmake is not installed")
    configure = [
        "cmake",
        "-S",
        ROOT / "plugins",
        "-B",
        tmp_path,
        f"-DORT_INCLUDE_DIR={ort_headers.folder}",
    ]
    subprocess.run(configure, check=True, capture_output=True)
    subprocess.run(["cmake", "--build", tmp_path], check=True, capture_output=True)
    assert check_library(next(tmp_path.glob("*asvit_ort.*"))) is None
