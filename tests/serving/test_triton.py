"""`package --triton`: repositories that Triton's own protobuf parses, and one that is served."""

from __future__ import annotations

import http.client
import importlib.util
import io
import itertools
import json
import os
import shutil
import socket
import struct
import subprocess
import sys
import sysconfig
import threading
import time
import types
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from conftest import refused
from PIL import Image

from asvit_deploy import sidecar
from asvit_deploy.artefacts.onnx_file import OnnxArtefact
from asvit_deploy.data.images import open_images
from asvit_deploy.errors import UserError
from asvit_deploy.serving import triton
from asvit_deploy.serving.in_triton import Input, Whole
from asvit_deploy.serving.pbtxt import Config, Tensor

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="session")
def parse():
    """Parses a `config.pbtxt` as Triton does."""
    text_format = pytest.importorskip("google.protobuf.text_format")
    found = importlib.util.find_spec("tritonclient")
    if found is None:
        pytest.skip("tritonclient is not installed (the extra dev)")
    # Its package imports gRPC, which the messages do without.
    spec = importlib.util.spec_from_file_location(
        "model_config_pb2", Path(found.origin).parent / "grpc" / "model_config_pb2.py"
    )
    proto = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(proto)
    return lambda folder: text_format.Parse(
        (folder / "config.pbtxt").read_text(), proto.ModelConfig()
    )


def ran(cli, *args):
    result = cli("package", *args)
    assert result.code == 0, result.err
    return result


def engine(path: Path, model: Path, **fields: object) -> Path:
    """What stands for an engine: its sidecar is real, its plan is not, which nothing here reads."""
    kept = sidecar.read(model)
    for key in ("schema", "sha256", "digest"):
        del kept[key]
    own = {"kind": "engine", "flavour": "tensorrt", "flavour_version": "10.16", "mode": "dynamic",
           "target_sms": [], "plugin_layers": 3,
           "plugin": {"sha256": "0", "embedded": False},
           "profile": {"images": [[n, 3, 32, 32] for n in (1, 4, 6)]},
           "outputs": {"logits": ["FLOAT", -1, 10], "length_0": ["INT32", -1],
                       "length_1": ["INT64", -1]}}  # fmt: skip
    sidecar.write(path, b"plan", {**kept, **own, **fields})
    return path


# --- what is written ----------------------------------------------------------------------------


def test_the_onnx_runtime_backend(cli, mini_artifacts, op_library, parse, tmp_path):
    model = mini_artifacts["dynamic", "auto"]
    done = ran(cli, model, "--triton", "models", "--name", "vit", "--max-batch", 4)
    assert done.out == "models/vit\n"
    assert "tritonserver --model-repository=models" in done.err
    assert sorted(path.name for path in Path("models").iterdir()) == [
        "vit", "vit_input", "vit_network",
    ]  # fmt: skip
    network, step, whole = (parse(Path("models", f"vit{e}")) for e in ("_network", "_input", ""))
    assert (network.backend, network.max_batch_size) == ("onnxruntime", 4)
    assert network.HasField("dynamic_batching")
    session = OnnxArtefact(model).runner(None, record=False).session
    assert [one.name for one in network.input] == [one.name for one in session.get_inputs()]
    assert list(network.input[0].dims) == session.get_inputs()[0].shape[1:]
    assert [one.name for one in network.output] == [one.name for one in session.get_outputs()]
    assert [list(one.dims) for one in network.output] == [[10], [1], [1], [1]]
    assert [one.HasField("reshape") for one in network.output] == [False, True, True, True]
    assert Path("models/vit_network/1/model.onnx").read_bytes() == model.read_bytes()
    assert not network.model_operations.op_library_filename, "the function runs"
    assert (step.backend, step.max_batch_size) == ("python", 4)
    assert (whole.platform, whole.max_batch_size) == ("ensemble", 4)
    assert [one.model_name for one in whole.ensemble_scheduling.step] == [step.name, network.name]
    first, second = whole.ensemble_scheduling.step
    assert dict(first.output_map) == dict(second.input_map) == {"images": "images"}
    assert set(second.output_map) == {one.name for one in network.output}
    assert list(first.input_map) == [one.name for one in step.input] == ["picture"]
    assert Path("models/vit/1").is_dir()

    ran(cli, model, "--triton", "models", "--name", "own", "--library", op_library)
    network = parse(Path("models/own_network"))
    (library,) = network.model_operations.op_library_filename
    assert library == str(tmp_path / "models/own_network/libasvit_ort.so")
    assert Path(library).read_bytes() == op_library.read_bytes()


def test_the_tensorrt_backend(cli, mini_artifacts, parse, tmp_path):
    plan = engine(tmp_path / "m.engine", mini_artifacts["dynamic", "auto"])
    library(tmp_path / "libasvit_trt.so", b"getCreators")
    own = library(tmp_path / "libasvit_trt_autoreg.so")
    ran(cli, plan, "--triton", "models", "--plugin", "libasvit_trt.so")
    done = ran(cli, plan, "--triton", "models", "--plugin", own, "--force")
    assert "--backend-config=tensorrt,plugins=models/m_network/libasvit_trt_autoreg.so" in done.err
    network, whole = parse(Path("models/m_network")), parse(Path("models/m"))
    outputs = [(one.name, one.data_type, list(one.dims)) for one in network.output]
    fp32, int32, int64 = 11, 8, 9
    assert (network.backend, network.max_batch_size) == ("tensorrt", 6)
    assert outputs == [("logits", fp32, [10]), ("length_0", int32, [1]), ("length_1", int64, [1])]
    assert [(one.name, one.data_type, list(one.dims)) for one in whole.output] == outputs
    assert Path("models/m_network/1/model.plan").read_bytes() == b"plan"
    assert Path("models/m_network/libasvit_trt_autoreg.so").read_bytes() == own.read_bytes()
    assert [one.model_name for one in whole.ensemble_scheduling.step] == ["m_input", "m_network"]
    carried = engine(tmp_path / "c.engine", mini_artifacts["dynamic", "auto"],
                     plugin={"sha256": "0", "embedded": True})  # fmt: skip
    done = ran(cli, carried, "--triton", "models", "--max-batch", 2)
    assert "--backend-config=tensorrt,version-compatible=true" in done.err
    assert not list(Path("models/c_network").glob("*.so"))
    assert parse(Path("models/c_network")).max_batch_size == 2
    refused(cli("package", carried, "--triton", "more", "--max-batch", 7), "takes, 6; give no more")
    for fields in ({"outputs": {"x": ["FLOAT", 3, 4]}}, {"outputs": {}}, {"profile": None}):
        old = engine(tmp_path / "o.engine", mini_artifacts["dynamic", "auto"], **fields)
        refused(cli("package", old, "--triton", "more"), "does not say its largest batch",
                "build it again")  # fmt: skip
    assert not Path("more").exists()


def library(path: Path, *words: bytes) -> Path:
    """What stands for a plugin's library; nothing here loads it."""
    path.write_bytes(b" ".join(words or (b"getPluginRegistry", b".nv_fatbin")))
    return path


def test_a_plugin_that_does_not_register_itself(cli, mini_artifacts, tmp_path):
    plan = engine(tmp_path / "m.engine", mini_artifacts["dynamic", "auto"])
    args = ("package", plan, "--triton", "models", "--plugin")
    other = library(tmp_path / "libasvit_trt.so", b"getCreators", b".nv_fatbin")
    refused(cli(*args, other), "does not register itself", "libasvit_trt_autoreg.so")
    twin = library(tmp_path / "libasvit_trt_autoreg.so", b"getPluginRegistry")
    for named in (other, twin):
        refused(cli(*args, named), "holds no CUDA code", "build-plugins trt")
    assert not Path("models").exists()


def test_places_that_the_server_cannot_be_told(cli, mini_artifacts, op_library, tmp_path):
    plan = engine(tmp_path / "m.engine", mini_artifacts["dynamic", "auto"])
    own = library(tmp_path / "libasvit_trt_autoreg.so")
    refused(cli("package", plan, "--triton", "a;b", "--plugin", own), "';', which parts plugins")
    done = ran(cli, plan, "--triton", "a b", "--plugin", own)
    assert (
        "tritonserver '--model-repository=a b' '--backend-config=tensorrt,plugins=a b/" in done.err
    )
    odd = os.fsdecode(b"\xff")
    model = mini_artifacts["dynamic", "auto"]
    refused(cli("package", model, "--triton", odd, "--library", op_library), "no UTF-8")
    assert not Path(odd).exists()
    ran(cli, model, "--triton", odd)


def test_the_python_backend(cli, mini_artifacts, parse):
    ran(cli, mini_artifacts["1", "auto"], "--triton", "models", "--backend", "python")
    config = parse(Path("models/mini_1_auto"))
    assert (config.backend, config.max_batch_size) == ("python", 8)
    assert [one.name for one in config.output] == ["logits", *(f"length_{s}" for s in range(3))]
    assert not any(one.HasField("reshape") for one in config.output)
    assert len(list(Path("models").iterdir())) == 1


def test_names_are_quoted(parse, tmp_path):
    odd = 'a"b\\c\nd\té'
    config = Config(odd, "python", 1, [Tensor(odd, "TYPE_STRING", (1,))], [], library=odd)
    (tmp_path / "config.pbtxt").write_text(config.text())
    found = parse(tmp_path)
    assert (found.name, found.input[0].name) == (odd, odd)
    assert list(found.model_operations.op_library_filename) == [odd]


def test_a_repository_with_another_model(cli, mini_artifacts):
    one, other = mini_artifacts["1", "auto"], mini_artifacts["dynamic", "auto"]
    options = ("--triton", "models", "--name", "m", "--backend", "python")
    ran(cli, one, *options)
    before = Path("models/m/1/model.onnx").read_bytes()
    refused(cli("package", one, *options), "models/m holds this model already", "--force")
    refused(cli("package", other, *options), "models/m holds another model", "--name")
    assert Path("models/m/1/model.onnx").read_bytes() == before
    ran(cli, other, *options, "--force")
    assert Path("models/m/1/model.onnx").read_bytes() == other.read_bytes()
    ran(cli, other, "--triton", "models", "--name", "m_input", "--backend", "python")
    for more in ((), ("--force",)):
        refused(cli("package", other, "--triton", "models", "--name", "m", *more),
                "models/m", "of the model m_input" if more else "m_input")  # fmt: skip
    shutil.rmtree("models/m_input")
    ran(cli, other, "--triton", "models", "--name", "m", "--force")
    assert len(list(Path("models").iterdir())) == 3
    ran(cli, other, *options, "--force")  # an ensemble's other models go
    Path("models/n_input").mkdir()
    Path("models/n_input/config.pbtxt").write_text("another's")
    for more in ((), ("--force",)):
        refused(cli("package", other, "--triton", "models", "--name", "n", *more),
                "models/n_input was not written by `asvit-deploy package`")  # fmt: skip
    assert sorted(path.name for path in Path("models").iterdir()) == ["m", "n_input"]


def test_a_model_without_its_library(cli, mini_artifacts, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "empty"))
    bare = mini_artifacts["1", "custom"]
    refused(cli("package", bare, "--triton", "models", "--backend", "python"),
            "exported with --ops custom and the op's library is not built")  # fmt: skip
    plan = engine(tmp_path / "m.engine", mini_artifacts["dynamic", "auto"])
    refused(cli("package", plan, "--triton", "models"), "needs the op's TensorRT library",
            "build-plugins trt")  # fmt: skip
    refused(cli("package", plan, "--triton", "models", "--plugin", "gone.so"), "gone.so does not")
    refused(cli("package", mini_artifacts["1", "auto"], "--triton", "models", "--library", "no.so"),
            "no.so")  # fmt: skip
    assert not Path("models").exists()


def test_bad_input(cli, mini_artifacts, tmp_path):
    single, several = mini_artifacts["1", "auto"], mini_artifacts["dynamic", "auto"]
    rtx = engine(tmp_path / "x.engine", several, flavour="tensorrt-rtx")
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to("nowhere")
    for args, word in (
        ((single,), "takes one picture at a time"),
        ((several, "--backend", "tensorrt"), "is none"),
        ((rtx, "--backend", "python"), "is none"),
        ((rtx,), "Triton has no backend for that"),
        ((several, "--name", "a/b"), "cannot name a model"),
        ((several, "--plugin", "p.so"), "--plugin has no use"),
        ((several, "--triton", "file"), "cannot be made a folder"),
        ((several, "--triton", "gone/models"), "cannot be made a folder"),
        ((several, "--triton", "link"), "cannot be made a folder"),
        ((several, "--max-batch", 3_000_000_000), "Triton takes 2,147,483,647 at most"),
        (("gone.onnx",), "gone.onnx does not exist"),
    ):
        refused(cli("package", "--triton", "models", *args), word)
    assert not Path("models").exists()


def test_a_repository_that_got_nothing_is_gone(cli, mini_artifacts, monkeypatch):
    def full(*_):
        raise UserError("cannot write it: No space left on device")

    monkeypatch.setattr(triton, "put", full)
    args = ("package", mini_artifacts["dynamic", "auto"], "--triton", "models")
    refused(cli(*args), "No space left on device")
    assert not Path("models").exists()
    Path("models").mkdir()
    refused(cli(*args), "No space left on device")
    assert not list(Path("models").iterdir())


# --- what answers -------------------------------------------------------------------------------


class Sent(NamedTuple):
    """A tensor or a request of one, for code that gets these of the server."""

    files: list[bytes]

    def as_numpy(self) -> np.ndarray:
        return np.array(self.files, object).reshape(-1, 1)


@pytest.fixture
def backend(monkeypatch) -> None:
    """The server's own module is compiled into it, and is these few names here."""
    module = types.ModuleType("triton_python_backend_utils")
    module.get_input_tensor_by_name = lambda request, name: {"picture": request}[name]
    module.Tensor = lambda name, values: (name, values)
    module.TritonError = str
    module.InferenceResponse = lambda output_tensors=(), error=None: (dict(output_tensors), error)
    monkeypatch.setitem(sys.modules, module.__name__, module)


def started(kind: type[Input], folder: Path) -> Input:
    made = kind()
    made.initialize({"model_repository": str(folder), "model_version": "1"})
    return made


def test_a_bad_request_in_a_batch_fails_alone(backend, cli, mini_artifacts, mini_config):
    ran(cli, mini_artifacts["dynamic", "auto"], "--triton", "m", "--name", "v")
    first, second = pictures(mini_config, 2)
    requests = [Sent([first]), Sent([b"no picture"]), Sent([]), Sent([second, first])]
    good, bad, none, several = started(Input, Path("m/v_input")).execute(requests)
    assert [one[0]["images"].shape[0] for one in (good, several)] == [1, 2]
    np.testing.assert_array_equal(good[0]["images"][0], several[0]["images"][1])
    assert "the picture sent" in bad[1]
    assert "no pictures" in none[1]


def test_what_fails_a_batch_is_an_error_of_each_request(backend, cli, mini_artifacts, mini_config):
    ran(cli, mini_artifacts["dynamic", "auto"], "--triton", "m", "--name", "v",
        "--backend", "python")  # fmt: skip
    whole, (first, second) = started(Whole, Path("m/v")), pictures(mini_config, 2)
    runner = whole.runner

    def fails(images):
        if len(images) > 1:
            raise RuntimeError(f"no room for {len(images)}\nat all")
        return runner(images)

    whole.runner = fails
    one, two, three = whole.execute([Sent([first]), Sent([first, second]), Sent([second])])
    assert one[0]["logits"].shape == three[0]["logits"].shape == (1, 10)
    assert two[1] == "no room for 2 at all"


def test_an_input_of_another_network_does_not_load(cli, mini_artifacts):
    one, other = mini_artifacts["dynamic", "auto"], mini_artifacts["1", "auto"]
    ran(cli, one, "--triton", "m", "--name", "v")
    ran(cli, other, "--triton", "n", "--name", "v_network", "--backend", "python")
    started(Input, Path("m/v_input"))
    Path("m/v_network/asvit.json").write_text(Path("n/v_network/asvit.json").read_text())
    with pytest.raises(UserError, match="another model than m/v_network"):
        started(Input, Path("m/v_input"))
    shutil.rmtree("m/v_network")  # the server may copy each to a place of its own
    started(Input, Path("m/v_input"))


# --- served -------------------------------------------------------------------------------------


class Server(NamedTuple):
    """A running Triton with one model."""

    process: subprocess.Popen
    port: int
    name: str

    def infer(self, files: list[bytes]) -> dict[str, np.ndarray]:
        """Pictures in one request, as the inference protocol (v2) has it, with binary inputs."""
        data = b"".join(struct.pack("<I", len(file)) + file for file in files)
        asked: dict[str, Any] = {"inputs": [{
            "name": "picture", "shape": [len(files), 1], "datatype": "BYTES",
            "parameters": {"binary_data_size": len(data)},
        }]}  # fmt: skip
        header = json.dumps(asked).encode()
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=120)
        try:
            connection.request("POST", f"/v2/models/{self.name}/infer", header + data,
                               {"Inference-Header-Content-Length": str(len(header))})  # fmt: skip
            answer = connection.getresponse()
            said = json.loads(answer.read())
        finally:
            connection.close()
        if answer.status != 200:
            raise RuntimeError(said["error"])
        return {one["name"]: np.reshape(one["data"], one["shape"]) for one in said["outputs"]}

    def made(self) -> tuple[int, int]:
        """Pictures that it has answered, and in how many batches."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=5)
        connection.request("GET", f"/v2/models/{self.name}/stats")
        (said,) = json.loads(connection.getresponse().read())["model_stats"]
        connection.close()
        return said["inference_count"], said["execution_count"]

    def ready(self) -> bool:
        try:
            connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=5)
            connection.request("GET", f"/v2/models/{self.name}/ready")
            return connection.getresponse().status == 200
        except OSError:
            return False

    def used(self) -> tuple[float, int]:
        """MiB that it and its children hold, and their open files."""
        family = {self.process.pid}
        parents = {}
        for stat in Path("/proc").glob("[0-9]*/stat"):
            try:
                parents[int(stat.parent.name)] = int(stat.read_text().rsplit(")", 1)[1].split()[1])
            except OSError:
                continue
        for _ in range(4):
            family |= {pid for pid, parent in parents.items() if parent in family}
        pages = sum(int(Path(f"/proc/{pid}/statm").read_text().split()[1]) for pid in family)
        files = sum(len(os.listdir(f"/proc/{pid}/fd")) for pid in family)
        return pages * os.sysconf("SC_PAGE_SIZE") / 2**20, files


@pytest.fixture(scope="module")
def tritonserver(tmp_path_factory) -> Path:
    """The folder of NVIDIA's wheel that carries a server with the Python backend alone."""
    # Its backend was compiled against NumPy 1, whose arrays have another layout.
    place = tmp_path_factory.mktemp("pytriton")
    wanted = ("nvidia-pytriton==0.7.0", "numpy==1.26.4")
    done = subprocess.run(
        [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", place,
         "--disable-pip-version-check", *wanted],
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    if done.returncode:
        said = done.stderr.strip()[-200:]
        assert "No matching distribution" in said, said
        pytest.skip(f"{wanted} cannot be had here: {said}")
    home = place / "pytriton" / "tritonserver"
    stub = home / "python_backend_stubs" / f"{sys.version_info[0]}.{sys.version_info[1]}"
    if not (stub / "triton_python_backend_stub").is_file():
        pytest.skip("that server has no backend for this Python")
    shutil.copy(stub / "triton_python_backend_stub", home / "backends" / "python")
    for program in (home / "bin" / "tritonserver",
                    home / "backends" / "python" / "triton_python_backend_stub"):  # fmt: skip
        program.chmod(0o755)
    return place


@pytest.fixture(scope="module")
def server(tritonserver, mini_artifacts, tmp_path_factory) -> Iterator[Server]:
    import asvit_deploy

    folder = tmp_path_factory.mktemp("repository")
    model = mini_artifacts["dynamic", "auto"]
    asvit_deploy.package(model, triton=folder / "models", backend="python", name="vit", max_batch=4)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    home = tritonserver / "pytriton" / "tritonserver"
    libraries = [str(tritonserver / "nvidia_pytriton.libs"), sysconfig.get_config_var("LIBDIR")]
    numpy = tritonserver / "numpy-alone"
    numpy.mkdir()
    for name in ("numpy", "numpy.libs"):
        (numpy / name).symlink_to(tritonserver / name)
    # The backend passes over PYTHONPATH, and takes the environment of the first python3.
    python = folder / "python"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", python], check=True)
    (site,) = python.glob("lib/python*/site-packages")
    paths = (numpy, ROOT, sysconfig.get_paths()["purelib"])
    (site / "paths.pth").write_text("".join(f"{path}\n" for path in paths))
    environment = {
        **os.environ, "OMP_NUM_THREADS": "1", "LD_LIBRARY_PATH": os.pathsep.join(libraries),
        "PATH": os.pathsep.join([str(python / "bin"), os.environ["PATH"]]),
    }  # fmt: skip
    command = [
        home / "bin" / "tritonserver", f"--model-repository={folder / 'models'}",
        f"--backend-directory={home / 'backends'}", f"--http-port={port}",
        "--http-address=127.0.0.1", "--allow-grpc=false", "--allow-metrics=false",
        "--http-thread-count=4",
    ]  # fmt: skip
    log = folder / "log"
    with open(log, "w") as out:
        process = subprocess.Popen(list(map(str, command)), stdout=out, stderr=out, env=environment)
    found = Server(process, port, "vit")
    until = time.monotonic() + 240
    while not found.ready() and time.monotonic() < until and process.poll() is None:
        time.sleep(0.2)
    try:
        if process.poll() is not None and "GLIBC_" in log.read_text():
            pytest.skip("that server takes a newer glibc")
        assert found.ready(), log.read_text()[-3000:]
        yield found
    finally:
        process.terminate()
        process.wait(60)


def pictures(config, count: int) -> list[bytes]:
    found = []
    for view in open_images(None, config, limit=count).views:
        file = io.BytesIO()
        view.picture().resize((96, 80)).save(file, "PNG")
        found.append(file.getvalue())
    return found


@pytest.mark.slow
def test_fifty_pictures_are_answered_as_by_the_runner(server, mini_artifacts, mini_config):
    """Eight clients at once, so that the server makes batches: nothing is lost, nothing grows."""
    from asvit_deploy.data.images import preprocess

    files = pictures(mini_config, 50)
    runner = OnnxArtefact(mini_artifacts["dynamic", "auto"]).runner(None)
    expected = [
        runner(preprocess(Image.open(io.BytesIO(file)).convert("RGB"), mini_config)[None])
        for file in files
    ]
    gate, lost = threading.Barrier(8), []

    def client(which: int) -> list[tuple[int, dict[str, np.ndarray]]]:
        gate.wait()
        own = []
        for number in itertools.islice(itertools.cycle(range(which, 50, 8)), 14):
            try:
                own.append((number, server.infer([files[number]])))
            except (OSError, RuntimeError) as error:
                lost.append(error)
        return own

    def everyone() -> list[tuple[int, dict[str, np.ndarray]]]:
        with ThreadPoolExecutor(8) as clients:
            return [one for own in clients.map(client, range(8)) for one in own]

    answers = everyone() + everyone()  # its allocators have what they need by then
    before = server.used()
    answers += everyone() + everyone() + everyone() + everyone()
    after = server.used()
    answered, batches = server.made()
    assert batches < answered == len(answers), "no batch was made of several requests"
    assert not lost
    assert len(answers) == 6 * 8 * 14
    assert {number for number, _ in answers} == set(range(50))
    for number, said in answers:
        np.testing.assert_allclose(said["logits"], expected[number].output, rtol=0, atol=1e-4)
        for stage, rows in enumerate(expected[number].lengths):
            assert said[f"length_{stage}"].tolist() == [[int(rows[0])]]
    # A picture's pixels take 23 KiB, its input 12: none of them stays.
    assert (after[0] - before[0]) * 1024 / (4 * 8 * 14) < 16, (before, after)
    assert after[1] <= before[1] + 2, (before, after)


@pytest.mark.slow
def test_a_picture_that_cannot_be_read_fails_its_own_request_alone(server, mini_config):
    (good,) = pictures(mini_config, 1)
    with pytest.raises(RuntimeError, match="the picture sent"):
        server.infer([b"no picture"])
    assert server.infer([good, good])["logits"].shape == (2, 10)
