#!/usr/bin/env bash
# Builds the service's image with docker, or with buildah where no docker engine answers (as root; installed by
# apt-get if it is missing).
#
#   scripts/image.sh [--release] [cpu|gpu]
#
#   --release    refuse a base image that is not named by its digest, and changes that are in no commit: what is published
#                can then be traced to both (deploy/release.md). Otherwise a tag is used with a warning.
#
#   IMAGE        name of the result                    default perturbscope:TARGET
#   BUNDLE       the one bundle that is baked in        default all of bundles/
#   BASE_IMAGE   image to start from                   default docker: the Dockerfile's; buildah: a fresh Debian
#                                                      bookworm made by debootstrap, so that no registry is needed
#   STORE        where buildah keeps its images        default ~/.cache/perturbscope/images
#
# buildah is given this machine's pip settings (files, variables, and the local paths that they name) for the time of
# the build; the image keeps none of them.
set -euo pipefail

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
STORE="${STORE:-${XDG_CACHE_HOME:-$HOME/.cache}/perturbscope/images}"
BUNDLE="${BUNDLE:-}"

say() { printf '+ %s\n' "$*" >&2; }
fail() { printf 'error: %s\n' "$*" >&2; exit 1; }

engine() { # docker | buildah
    if command -v docker >/dev/null && timeout 10 docker info >/dev/null 2>&1; then echo docker; else echo buildah; fi
}

need() { # need COMMAND: install it by apt-get where it is missing
    command -v "$1" >/dev/null && return
    if [ "$(id -u)" != 0 ] || ! command -v apt-get >/dev/null; then
        fail "no docker engine answers and $1 is not installed; start docker, or install $1 and run this as root"
    fi
    say "apt-get install $1"
    apt-get update -qq
    DEBIAN_FRONTEND=noninteractive apt-get install -qq --yes --no-install-recommends "$1" >/dev/null
}

store() { buildah --storage-driver vfs --root "$STORE" --runroot "$STORE/run" "$@"; }

debian_base() { # prints the name of a Debian bookworm image without Python, made once
    local name=localhost/debian:bookworm-minbase rootfs container
    if ! store inspect --type image "$name" >/dev/null 2>&1; then
        need debootstrap
        rootfs="$(mktemp -d)"
        say "debootstrap bookworm (once; kept in $STORE)"
        debootstrap --variant=minbase bookworm "$rootfs" >"$rootfs.log" 2>&1 || { tail -5 "$rootfs.log" >&2; fail "debootstrap"; }
        rm -rf "$rootfs"/var/cache/apt/archives/*.deb "$rootfs"/var/lib/apt/lists/*
        container="$(store from scratch)"
        store copy --quiet "$container" "$rootfs" / >/dev/null
        store commit --quiet --rm "$container" "$name" >/dev/null
        rm -rf "$rootfs" "$rootfs.log"
    fi
    echo "$name"
}

pip_options() { # pip_options DIRECTORY: this machine's pip settings as options of the build, one a line
    python3 - "$1" <<'PYTHON'
import ast, pathlib, re, shutil, subprocess, sys

# All is mounted below /mnt, which every image has: a mount point made for the build would stay in the image.
here, inside = pathlib.Path(sys.argv[1]), "/mnt"
listing = subprocess.run([sys.executable, "-m", "pip", "config", "list"], capture_output=True, text=True).stdout
settings = {}  # variables come last and win, as they do in pip
for key, value in re.findall(r"^(\S+?)=(.*)$", listing, flags=re.M):
    settings[key.rsplit(".", 1)[-1]] = ast.literal_eval(value).split()
volumes = {}
for words in settings.values():
    for position, word in enumerate(words):
        path = pathlib.Path(word.removeprefix("file://"))
        if path.is_absolute() and path.is_file():  # a certificate
            shutil.copy(path, here / path.name)
            words[position] = f"{inside}/{path.name}"
        elif path.is_absolute() and path.is_dir():
            root = path if word == str(path) else path.parent  # an index on disk links to files beside it
            name = volumes.setdefault(root, f"volume{len(volumes)}")
            (here / name).mkdir(exist_ok=True)
            words[position] = word.replace(str(root), f"{inside}/{name}", 1)
if settings:
    lines = [f"{key} = " + "\n    ".join(words) for key, words in settings.items()]
    (here / "pip.conf").write_text("\n".join(["[global]", *lines, ""]))
    print(f"--build-arg=PIP_CONFIG_FILE={inside}/pip.conf\n--volume={here}:{inside}:ro")
for root, name in volumes.items():
    print(f"--volume={root}:{inside}/{name}:ro")
PYTHON
}

base_image() { # the base that is built from: the setting, else the Dockerfile's
    echo "${BASE_IMAGE:-$(sed -n 's/^ARG BASE_IMAGE=//p' "$root/Dockerfile")}"
}

by_digest() { # by_digest IMAGE: does the name say which bytes it means?
    [[ "$1" =~ ^[a-z0-9][a-z0-9./:_-]*@sha256:[0-9a-f]{64}$ ]]
}

releasable() { # fails if an image that was built now could not be traced
    local base
    base="$(base_image)"
    by_digest "$base" ||
        fail "a release needs a base image by digest, and $base is a tag; run scripts/pin_base.sh, or set BASE_IMAGE=NAME@sha256:..."
    if ! git -C "$root" diff --quiet HEAD -- || [ -n "$(git -C "$root" ls-files --others --exclude-standard)" ]; then
        fail "a release is built from a commit, and there are changes that are in none"
    fi
}

build() { # build TARGET IMAGE
    local target="$1" image="$2" base settings revision options=()
    [ -z "$BUNDLE" ] || [ -f "$root/$BUNDLE/manifest.json" ] ||
        fail "$BUNDLE holds no bundle; name one below bundles/ as BUNDLE=bundles/NAME"
    compgen -G "$root/bundles/*/manifest.json" >/dev/null || fail "bundles/ holds no bundle"
    options=(--target "$target" --build-arg "BUNDLE=$BUNDLE" --tag "$image" --file "$root/Dockerfile")
    revision="$(git -C "$root" rev-parse HEAD 2>/dev/null || true)"
    [ -z "$revision" ] || options+=(--label "org.opencontainers.image.revision=$revision")
    options+=(--label org.opencontainers.image.licenses=Apache-2.0)
    if [ "$(engine)" = docker ]; then
        by_digest "$(base_image)" || say "warning: $(base_image) is a tag, and may be another image tomorrow (scripts/pin_base.sh)"
        options+=(--build-arg "BASE_IMAGE=$(base_image)" --label "org.opencontainers.image.base.name=$(base_image)")
        docker build "${options[@]}" "$root"
    else
        need buildah
        mkdir -p "$STORE"
        settings="$(mktemp -d)"
        mapfile -t pip < <(pip_options "$settings")
        base="${BASE_IMAGE:-}"
        # A release starts from what the Dockerfile names; anything else from a base that needs no registry.
        [ -n "$base" ] || { [ -n "${RELEASE:-}" ] && base="$(base_image)" || base="$(debian_base)"; }
        options+=(--build-arg "BASE_IMAGE=$base" "${pip[@]}")
        # --format docker: OCI images have no HEALTHCHECK and no SHELL.
        store bud --isolation chroot --format docker "${options[@]}" "$root"
        rm -rf "$settings"
    fi
}

if [ "${BASH_SOURCE[0]}" = "$0" ]; then
    RELEASE=""
    if [ "${1:-}" = --release ]; then
        RELEASE=yes
        shift
        releasable
    fi
    target="${1:-cpu}"
    build "$target" "${IMAGE:-perturbscope:$target}"
fi
