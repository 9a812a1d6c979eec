"""Tensors of families with other inputs than token ids: per cell, positions, and values that padding has too."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
from numpy.typing import NDArray

from perturbscope.errors import InvalidParameterError, MalformedMatrixError, PerturbScopeError
from perturbscope.families import Family
from perturbscope.families.outputs import Outputs
from perturbscope.families.tokens import InputSpec, pad
from serving.openinference.tensors import InferRequest, Tensor, padded, tokens_of
from serving.settings import Settings
from tests.bundles import TINY_OUTPUTS

INPUTS = (
    InputSpec("gene_ids", "int64", 0, n_values=9),
    InputSpec("bins", "int64", 0, n_values=5, pad_is_a_value=True),
    InputSpec("values", "float32", -2, trailing=(2,)),
    InputSpec("order", "int64", 0, within_length=True),
    InputSpec("batch_label", "int64", 0, n_values=3, per="cell"),
    InputSpec("depth", "float32", 0, trailing=(2,), per="cell"),
    InputSpec("focus", "int64", 0, per="cell", within_length=True),
)
FAMILY = cast("Family", SimpleNamespace(inputs=INPUTS, max_length=6))
Arrays = dict[str, NDArray[Any]]


@pytest.fixture
def arrays() -> Arrays:
    """Two cells, of three tokens and of one."""
    return {
        "gene_ids": np.array([[8, 1, 2], [4, 0, 0]]),
        "bins": np.array([[0, 4, 0], [3, 0, 0]]),
        "values": np.array([[[1, 2], [-2, 3], [4, 5]], [[6, 7], [-2, -2], [-2, -2]]], dtype=np.float32),
        "order": np.array([[2, 0, 1], [0, 99, -5]]),
        "batch_label": np.array([2, 0]),
        "depth": np.array([[0.5, 1], [2, 3]], dtype=np.float32),
        "focus": np.array([2, 0]),
        "attention_mask": np.array([[1, 1, 1], [1, 0, 0]]),
    }


def request(arrays: Arrays) -> InferRequest:
    names = {"f": "FP32", "i": "INT64"}
    return InferRequest({name: Tensor(names[values.dtype.kind], values) for name, values in arrays.items()})


def test_what_comes_padded_is_padded_again_to_the_same(arrays: Arrays) -> None:
    tokens = tokens_of(request(arrays), FAMILY, Settings())
    assert tokens.lengths.tolist() == [3, 1]
    assert set(tokens.per_cell) == {"batch_label", "depth", "focus"}
    assert tokens.arrays["order"].tolist() == [2, 0, 1, 0]  # what stands behind the last token does not matter
    again = pad(tokens, np.arange(2), INPUTS)
    for name, values in arrays.items():
        wanted = values if name != "order" else np.array([[2, 0, 1], [0, 0, 0]])
        np.testing.assert_array_equal(again[name], wanted, err_msg=name)


@pytest.mark.parametrize(
    ("name", "place", "value", "message"),
    [
        ("gene_ids", (0, 1), 0, "0 in row 0 of the input 'gene_ids' is no token .* 0 to 8, and 0 is padding"),
        ("gene_ids", (1, 0), 9, "9 in row 1 of the input 'gene_ids'"),
        ("bins", (1, 0), 5, "5 in row 1 of the input 'bins' is no token of the vocabulary: ids lie in 0 to 4[.]"),
        ("values", (0, 2, 1), np.inf, "inf in row 0 of the input 'values' is not finite"),
        ("order", (0, 1), 3, "3 in row 0 of the input 'order' is no position in its cell"),
        ("order", (1, 0), 1, "1 in row 1 of the input 'order' is no position in its cell"),
        ("order", (0, 0), -1, "-1 in row 0 of the input 'order'"),
        ("batch_label", (1,), 3, "3 in row 1 of the input 'batch_label' is no token"),
        ("batch_label", (0,), -1, "-1 in row 0 of the input 'batch_label'"),
        ("depth", (1, 0), np.nan, "nan in row 1 of the input 'depth' is not finite"),
        ("focus", (1,), 1, "1 in row 1 of the input 'focus' is no position in its cell"),
    ],
)
def test_a_value_that_cannot_be_names_its_row(
    arrays: Arrays, name: str, place: tuple[int, ...], value: float, message: str
) -> None:
    arrays[name][place] = value
    with pytest.raises(InvalidParameterError, match=message) as caught:
        tokens_of(request(arrays), FAMILY, Settings())
    assert caught.value.field == name


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("batch_label", lambda a: a[:, None], r"'batch_label' has the shape \[2, 1\]; \[batch\] is needed"),
        ("batch_label", lambda a: a[:1], r"'batch_label' has the shape \[1\], but .* batch must agree"),
        ("depth", lambda a: a[:, :1], r"'depth' has the shape \[2, 1\]; \[batch, 2\] is needed"),
        ("depth", lambda a: a[:, None], r"\[batch, 2\] is needed"),
        ("values", lambda a: a[..., 0], r"'values' has the shape \[2, 3\]; \[batch, length, 2\] is needed"),
        ("bins", lambda a: a[:, :2], "batch and length must agree"),
        ("focus", lambda a: a.astype(np.float32), "'focus' has the datatype FP32; the model takes INT64"),
    ],
)
def test_a_form_that_is_not_that_of_the_input(arrays: Arrays, name: str, change: Any, message: str) -> None:
    arrays[name] = change(arrays[name])
    with pytest.raises(MalformedMatrixError, match=message) as caught:
        tokens_of(request(arrays), FAMILY, Settings())
    assert caught.value.field == name


@pytest.mark.parametrize("name", [spec.name for spec in INPUTS])
def test_no_input_may_be_left_out(arrays: Arrays, name: str) -> None:
    del arrays[name]
    with pytest.raises(PerturbScopeError, match=f"The input '{name}' is missing"):
        tokens_of(request(arrays), FAMILY, Settings())


def test_outputs_per_token_go_back_in_the_form_of_the_request() -> None:
    offsets = np.array([0, 3, 4], dtype=np.int64)
    outputs = Outputs.empty(TINY_OUTPUTS, offsets)
    for number, spec in enumerate(TINY_OUTPUTS):
        outputs.values[spec.name][:] = number + 1
    found = {spec.name: padded(outputs, spec, 4) for spec in TINY_OUTPUTS}
    assert {name: values.shape for name, values in found.items()} == {
        "cell_embedding": (2, 8),
        "gene_embedding": (2, 4, 8),
        "gene_value": (2, 4, 1),
        "cell_logits": (2, 3),
    }
    assert found["gene_value"][..., 0].tolist() == [[3, 3, 3, 0], [3, 0, 0, 0]]
    assert found["gene_embedding"].dtype == np.float32
