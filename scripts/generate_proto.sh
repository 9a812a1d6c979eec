#!/bin/sh
# Writes the *_pb2* of perturbscope/protocol/proto and perturbscope/inference from their .proto. Needs grpcio-tools and
# mypy-protobuf, at the versions of the development set: their version is part of what they write.
# usage: scripts/generate_proto.sh [DIRECTORY]    default: the checkout itself
set -eu
cd "$(dirname "$0")/.."
out="${1:-.}"
python="${PYTHON:-python3}"
bin="$(dirname "$(command -v "$python")")"
PATH="$bin:$PATH" "$python" -m grpc_tools.protoc -I . \
    --python_out="$out" --pyi_out="$out" --grpc_python_out="$out" --mypy_grpc_out="$out" \
    perturbscope/protocol/proto/perturbscope_v1.proto perturbscope/protocol/proto/open_inference.proto
# No service, so nothing of gRPC's.
PATH="$bin:$PATH" "$python" -m grpc_tools.protoc -I . \
    --python_out="$out" --pyi_out="$out" perturbscope/inference/onnx_graph.proto
