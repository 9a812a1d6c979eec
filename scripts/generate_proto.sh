#!/bin/sh
# Writes *_pb2* beside the .proto files of perturbscope/protocol/proto and perturbscope/inference. Needs grpcio-tools and
# mypy-protobuf at the versions of the development set, since their versions are part of what they write.
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
