"""One table of precisions, which says the same to every room."""

from __future__ import annotations

import subprocess
import sys

import onnx
import pytest
import torch

from asvit_deploy import precision
from asvit_deploy.parity import LIMITS
from asvit_deploy.precision import FLOAT32, HALVES, TABLE


@pytest.mark.parametrize("row", TABLE, ids=lambda row: row.option)
def test_every_name_of_a_row_means_the_same_numbers(row):
    assert precision.of_option(row.option) is row
    assert precision.of_name(row.name) is row
    assert precision.of_tensor_type(row.tensor_type) is row
    tensor = onnx.helper.make_tensor("x", row.onnx_type, [1], [1.0])
    assert onnx.numpy_helper.to_array(tensor).dtype.name == row.name
    assert str(torch.zeros(1, dtype=row.torch_type).dtype) == f"torch.{row.name}"
    assert row.option in LIMITS, "every precision has its limits"


@pytest.mark.parametrize("column", ["option", "name", "onnx_name", "tensorrt_name"])
def test_no_two_rows_share_a_name(column):
    assert len({getattr(row, column) for row in TABLE}) == len(TABLE)


def test_no_option_is_float32():
    assert precision.of_option(None) is FLOAT32
    assert FLOAT32.rewritten is None
    assert [row.rewritten for row in HALVES] == ["fp16", "bf16"]


@pytest.mark.parametrize("find", [precision.of_option, precision.of_name, precision.of_tensor_type])
def test_an_unknown_name_is_no_precision(find):
    with pytest.raises(KeyError):
        find("fp12")


@pytest.mark.parametrize("row", TABLE, ids=lambda row: row.option)
def test_onnx_runtime_lacks_what_the_table_says(row):
    ort = pytest.importorskip("onnxruntime")
    kind = {"FLOAT": "float"}.get(row.onnx_name, row.onnx_name.lower())
    model = onnx.parser.parse_model(
        f'<ir_version: 9, opset_import: ["": 20]> g ({kind}[2] x) => ({kind}[2] y) '
        "{ y = Add (x, x) }"
    )
    run = lambda: ort.InferenceSession(  # noqa: E731
        model.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    if row.runs_on("onnxruntime"):
        (given,) = run().get_inputs()
        assert given.type == row.tensor_type
    else:
        with pytest.raises(Exception, match="Add"):
            run()


def test_the_table_brings_neither_onnx_nor_torch():
    said = "import sys, asvit_deploy.precision; print({'torch', 'onnx'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", said], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
