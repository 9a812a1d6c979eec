#!/usr/bin/env bash
# Writes into the Dockerfile which image its base is today: name:tag becomes name:tag@sha256:..., so that every build from
# then on starts from the same bytes. Run it before a release, and look at what changed; needs the registry of the image,
# and docker (buildx), skopeo or crane to ask it.
#
#   scripts/pin_base.sh [NAME:TAG]     default the base that the Dockerfile names
set -euo pipefail

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
fail() { printf 'error: %s\n' "$*" >&2; exit 1; }

digest() { # digest NAME:TAG: of the list of all its architectures
    if command -v docker >/dev/null && docker buildx version >/dev/null 2>&1; then
        docker buildx imagetools inspect "$1" --format '{{.Manifest.Digest}}'
    elif command -v skopeo >/dev/null; then
        # The digest is the hash of the list as the registry has it.
        skopeo inspect --raw "docker://$1" | sha256sum | sed 's/^/sha256:/; s/ .*//'
    elif command -v crane >/dev/null; then
        crane digest "$1"
    else
        fail "docker with buildx, skopeo or crane is needed to ask a registry for a digest"
    fi
}

before="$(sed -n 's/^ARG BASE_IMAGE=//p' "$root/Dockerfile")"
name="${1:-$before}"
name="${name%@*}"
found="$(digest "$name")" || fail "the registry did not say which image $name is; the Dockerfile is as it was"
[[ "$found" =~ ^sha256:[0-9a-f]{64}$ ]] || fail "'$found' is no digest; the Dockerfile is as it was"
sed -i.before "s|^ARG BASE_IMAGE=.*|ARG BASE_IMAGE=$name@$found|" "$root/Dockerfile"
rm "$root/Dockerfile.before"
printf '%s\n-> %s\n' "$before" "$name@$found"
