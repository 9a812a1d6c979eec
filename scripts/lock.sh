#!/bin/sh
# Pins requirements/*.txt from pyproject.toml and requirements/*.in, each package with the SHA-256 of every file of its
# release. A pin that still fits stays as it is; remove its lines (or the file) to let it move. All files but the last are
# solved against each other, so that one environment holds them.
#
# Hashes say which bytes a version is, so an index that serves others is found out (pip install --require-hashes). No
# address of an index is written down. torch alone has no hash: its builds for CPU and for each CUDA are other files of
# other indexes under one version, and the machine decides which it needs. It has a file of its own, requirements/torch.txt,
# because pip takes hashes for all or for none.
set -eu
cd "$(dirname "$0")/.."
uv="${UV:-uv}"

pin() { # pin NAME [OPTION or SOURCE]...
    name="$1"
    shift
    file="requirements/$name.txt"
    "$uv" pip compile --quiet --python-version 3.11 --annotation-style line --no-header --generate-hashes \
        --output-file "$file" "$@" "requirements/$name.in"
    if [ "$name" = training ]; then # the local version of a build (+cpu) is dropped
        {
            echo "# Pinned by scripts/lock.sh (make lock) from requirements/training.in; edit that instead. It says why there is no hash."
            sed -nE 's/^(torch==[0-9.]+).*/\1/p' "$file"
        } >requirements/torch.txt
    fi
    # A CUDA build of torch pins its own libraries, and a CPU build of it has none.
    if [ "$name" = training ] || [ "$name" = evaluation ]; then
        awk '/^[^ #]/ { drop = /^(torch|triton|nvidia-[a-z0-9-]+|cuda-[a-z0-9-]+)==/ } !drop' "$file" >"$file.new"
        mv "$file.new" "$file"
    fi
    {
        echo "# Pinned by scripts/lock.sh (make lock) from requirements/$name.in; edit that instead."
        grep -v '^#' "$file"
    } >"$file.new"
    mv "$file.new" "$file"
}

pin serving --extra report --extra signatures pyproject.toml
pin training
pin evaluation
pin census
pin dev
pin build
pin fuzz
pin serving-gpu --constraint requirements/serving.txt --no-emit-package onnxruntime --extra report --extra signatures pyproject.toml requirements/serving.in
pin mutation # in environments of their own, so not solved against the others
pin peers
