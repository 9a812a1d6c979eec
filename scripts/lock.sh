#!/bin/sh
# Pins requirements/*.txt from pyproject.toml and requirements/*.in. A pin that still fits stays as it is; remove the
# line (or the file) to let it move. All files but the last are solved against each other, so that one environment holds them.
set -eu
cd "$(dirname "$0")/.."
uv="${UV:-uv}"

pin() { # pin NAME [OPTION or SOURCE]...
    name="$1"
    shift
    "$uv" pip compile --quiet --python-version 3.11 --annotation-style line --no-header \
        --output-file "requirements/$name.txt" "$@" "requirements/$name.in"
    # torch pins its own CUDA libraries, and a CPU build of it has none; its local version names a build, not a release.
    if [ "$name" = training ] || [ "$name" = evaluation ]; then
        sed -i -E '/^(nvidia-|cuda-|triton==)/d; s/^(torch==[0-9.]+)\+[a-z0-9]+/\1/' "requirements/$name.txt"
    fi
    {
        echo "# Pinned by scripts/lock.sh (make lock) from requirements/$name.in; edit that instead."
        grep -v '^#' "requirements/$name.txt"
    } >"requirements/$name.txt.new"
    mv "requirements/$name.txt.new" "requirements/$name.txt"
}

pin serving --extra report pyproject.toml
pin training
pin evaluation
pin census
pin dev
pin fuzz
pin serving-gpu --constraint requirements/serving.txt --no-emit-package onnxruntime --extra report pyproject.toml requirements/serving.in
pin peers # in an environment of its own, so not solved against the others
