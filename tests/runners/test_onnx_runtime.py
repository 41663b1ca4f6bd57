"""Sessions over our models, and what a user reads when one cannot be opened."""

from __future__ import annotations

import numpy as np
import onnx
import pytest

from asvit_deploy.checkpoints.load import load_checkpoint
from asvit_deploy.errors import UserError
from asvit_deploy.exporting.export import export
from asvit_deploy.exporting.half import to_half
from asvit_deploy.runners.base import decode
from asvit_deploy.runners.onnx_runtime import OrtRunner
from asvit_deploy.runners.pytorch import TorchRunner


def test_decode_follows_rows_back_to_the_input():
    # Stage 0 keeps tokens 1, 3, 4 of six; stage 1 keeps the last two of those.
    index = [np.array([[0, 2, 4, 5]]), np.array([[0, 2, 3]])]
    lengths = [np.array([4]), np.array([3])]
    scores = [np.arange(6, dtype=np.float32)[None], np.array([[7, 8, 9]], np.float32)]
    prediction = decode(np.zeros((1, 2)), lengths, index, scores)
    assert [stage[0].tolist() for stage in prediction.kept] == [[1, 3, 4], [3, 4]]
    np.testing.assert_array_equal(
        prediction.scores[1][0], np.array([np.nan, 7, np.nan, 8, 9, np.nan], np.float32)
    )


def test_records_what_pytorch_records(mini, mini_artifacts, photos):
    ours = TorchRunner(mini)(photos[0][None])
    theirs = OrtRunner(mini_artifacts["1", "auto"])(photos[0][None])
    for stage in range(3):
        np.testing.assert_array_equal(ours.kept[stage][0], theirs.kept[stage][0])
        np.testing.assert_allclose(
            ours.scores[stage][0], theirs.scores[stage][0], rtol=1e-4, atol=1e-7
        )


def test_timed_session_has_no_extra_outputs(mini_artifacts, photos):
    runner = OrtRunner(mini_artifacts["1", "auto"], record=False)
    assert len(runner.session.get_outputs()) == 4
    prediction = runner(photos[0][None])
    assert prediction.kept is None
    assert len(prediction.lengths) == 3


@pytest.mark.parametrize("content", [b"", b"not a model", b"\x00" * 64])
def test_refuses_what_is_no_model(tmp_path, content):
    path = tmp_path / "model.onnx"
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"model\.onnx"):
        OrtRunner(path)


def test_refuses_a_truncated_model(tmp_path, mini_artifacts):
    path = tmp_path / "model.onnx"
    path.write_bytes(mini_artifacts["1", "auto"].read_bytes()[:-1000])
    with pytest.raises(UserError, match=r"model\.onnx"):
        OrtRunner(path)


def test_says_how_to_run_the_node_alone(mini_artifacts):
    with pytest.raises(UserError, match="build-plugins ort"):
        OrtRunner(mini_artifacts["1", "custom"])


@pytest.mark.slow
@pytest.mark.parametrize("ops", ["auto", "standard"])
def test_describes_what_runs(mini_artifacts, ops):
    description = OrtRunner(mini_artifacts["1", ops], record=False).describe()
    assert description["op"] == {"auto": "function", "standard": "standard"}[ops]
    assert description["precision"] == "float32"


def test_describes_the_library(mini_artifacts, op_library):
    assert OrtRunner(mini_artifacts["1", "auto"], op_library).describe()["op"] == "library"
    # Given, but without a node to run.
    assert OrtRunner(mini_artifacts["1", "standard"], op_library).describe()["op"] == "standard"


def test_describes_half_precision(mini_artifacts):
    model = to_half(onnx.load(mini_artifacts["1", "standard"]), "fp16")
    assert OrtRunner(model, record=False).describe()["precision"] == "float16"


@pytest.mark.slow
def test_describes_a_dense_model(mini_checkpoint, photos, tmp_path):
    path = tmp_path / "dense.onnx"
    export(load_checkpoint(mini_checkpoint), path, photos, "1", "auto", dense=True)
    assert OrtRunner(path).describe()["op"] == "none"


def test_missing_file():
    with pytest.raises(UserError, match="does not exist"):
        OrtRunner(__import__("pathlib").Path("nowhere.onnx"))


@pytest.mark.slow
def test_accepts_any_batch_when_dynamic(mini_artifacts, photos):
    runner = OrtRunner(mini_artifacts["dynamic", "auto"])
    single = [runner(photos[i][None]) for i in range(4)]
    batch = runner(photos.batch(range(4)))
    for i, alone in enumerate(single):
        assert [int(n[i]) for n in batch.lengths] == [int(n[0]) for n in alone.lengths]
        np.testing.assert_allclose(batch.output[i], alone.output[0], atol=1e-5)
    assert (
        onnx.load(mini_artifacts["dynamic", "auto"])
        .graph.input[0]
        .type.tensor_type.shape.dim[0]
        .dim_param
    )
