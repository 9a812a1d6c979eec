"""Answers of other versions of the server: what an older one does not send has a default, what a newer adds is left."""

from __future__ import annotations

import json
from typing import Any

import pytest

from perturbscope import protocol
from perturbscope.errors import InvalidParameterError
from perturbscope.protocol.proto import perturbscope_v1_pb2 as pb

OLD = {
    **dict.fromkeys(("name", "version", "model_id", "family", "vocabulary_hash", "layer", "pooling"), "x"),
    **{"width": 128, "licence": "MIT", "variant": "fp32", "device": "cpu", "golden": "matched"},
}
"""A model as servers described it before outputs had names."""


def test_the_models_of_an_older_server_have_the_defaults() -> None:
    from_json = protocol.answer_from_json(protocol.ModelsAnswer, json.dumps({"models": [OLD]}).encode())
    message = pb.ModelsAnswer(models=[pb.Model(**OLD)])
    from_proto = protocol.answer_from_proto(
        protocol.ModelsAnswer, pb.ModelsAnswer.FromString(message.SerializeToString())
    )
    assert from_json == from_proto
    assert from_json.problems == ()
    (info,) = from_json.models
    assert (info.outputs, info.capabilities, info.task, info.max_length) == ((), ("embed",), "", 0)


def test_an_older_client_finds_its_fields_where_they_were() -> None:
    info = protocol.ModelInfo(
        **OLD,  # type: ignore[arg-type]
        outputs=(protocol.OutputInfo(name="class", per="cell", width=2, meaning="logits", names=("a", "b")),),
        classes=("a", "b"),
        max_length=4096,
    )
    answer = protocol.ModelsAnswer(models=(info,), problems=(protocol.ModelProblem(name="b", problem="Why."),))
    (row,) = json.loads(protocol.answer_to_json(answer))["models"]
    assert {name: row[name] for name in OLD} == OLD
    message = protocol.answer_to_proto(answer).models[0]
    assert {name: getattr(message, name) for name in OLD} == OLD
    numbers = [field.number for field in message.DESCRIPTOR.fields if field.name in OLD]
    assert numbers == list(range(1, 13))


@pytest.mark.parametrize(
    ("outputs", "message"),
    [
        ("cell", "outputs must be a list"),
        ([3], "outputs must be a list of objects"),
        ([{"name": "class"}], "OutputInfo lacks 'per'"),
        ([{"name": "class", "per": "cell", "width": "2", "meaning": "logits"}], "width"),
    ],
)
def test_wrong_outputs_are_named(outputs: Any, message: str) -> None:
    with pytest.raises(InvalidParameterError, match=message):
        protocol.answer_from_json(protocol.ModelsAnswer, json.dumps({"models": [{**OLD, "outputs": outputs}]}).encode())
