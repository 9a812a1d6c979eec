#!/usr/bin/env bash
# Builds the CPU image, starts it as it would run (non-root, no capabilities, read-only but for /tmp where docker runs
# it), embeds a cell over HTTP and gRPC, checks what is inside, stops it, and removes it. Settings: scripts/image.sh.
#
#   KEEP=1   leaves the image
set -euo pipefail
# shellcheck source=scripts/image.sh
source "$(dirname "${BASH_SOURCE[0]}")/image.sh"

image="${IMAGE:-perturbscope:image-test}"
engine="$(engine)"
container=""
log="$(mktemp)"

clean_up() {
    status=$?
    [ "$status" = 0 ] || { say "FAILED; the end of the log of the service ($log):"; tail -40 "$log" >&2; }
    if [ -n "$container" ]; then
        if [ "$engine" = docker ]; then
            docker rm --force "$container" >/dev/null
        else
            stop
            store rm "$container" >/dev/null
        fi
    fi
    if [ -z "${KEEP:-}" ]; then
        if [ "$engine" = docker ]; then docker rmi "$image" >/dev/null 2>&1; else store rmi --prune --force >/dev/null 2>&1; store rmi "$image" >/dev/null 2>&1; fi || true
    fi
    [ "$status" != 0 ] || rm -f "$log"
}
trap clean_up EXIT

inside() { # inside COMMAND...: run in the started container, as the image's user
    if [ "$engine" = docker ]; then
        docker exec --interactive "$container" "$@"
    else
        store run --isolation chroot "$container" -- "$@"
    fi
}

stop() { # end the service that buildah runs: it has no `stop`, and its processes are this machine's
    local pid
    pid="$(cat "$mount/tmp/service.pid" 2>/dev/null)" || return 0
    kill -TERM "$pid" 2>/dev/null || return 0
    for _ in $(seq 60); do kill -0 "$pid" 2>/dev/null || return 0; sleep 0.5; done
    say "the service ignores SIGTERM"
    kill -KILL "$pid"
    return 1
}

free_port() { python3 -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])'; }

say "building the CPU image with $engine"
SECONDS=0
build cpu "$image"
say "built in $SECONDS s"

http=3000 grpc=3001
if [ "$engine" = docker ]; then
    say "size $(docker image inspect --format '{{.Size}}' "$image" | awk '{printf "%.0f MB", $1 / 1e6}')"
    start="$(date +%s%N)"
    container="$(docker run --detach --read-only --tmpfs /tmp --cap-drop ALL --security-opt no-new-privileges "$image")"
    docker logs --follow "$container" >"$log" 2>&1 &
else
    container="$(store from "$image")"
    mount="$(store mount "$container")"
    say "size $(du -sm "$mount" | cut -f1) MB, of which packages $(du -sm "$mount/opt/venv" | cut -f1) MB"
    http="$(free_port)" grpc="$(free_port)"
    marker="$(mktemp)"
    mapfile -t command < <(store inspect --type image --format '{{range .Docker.Config.Cmd}}{{println .}}{{end}}' "$image" | sed '/^$/d')
    start="$(date +%s%N)"
    # $$ is the service's process: chroot isolation shares this machine's processes and network.
    # shellcheck disable=SC2016
    inside env "PERTURBSCOPE_HTTP_PORT=$http" "PERTURBSCOPE_GRPC_PORT=$grpc" PERTURBSCOPE_HOST=127.0.0.1 \
        sh -c 'echo $$ >/tmp/service.pid; exec "$@"' sh "${command[@]}" >"$log" 2>&1 &
fi

say "starting; the image's own health check asks on port $http"
mapfile -t health < <(
    if [ "$engine" = docker ]; then
        docker image inspect --format '{{range .Config.Healthcheck.Test}}{{println .}}{{end}}' "$image"
    else
        store inspect --type image --format '{{range .Docker.Config.Healthcheck.Test}}{{println .}}{{end}}' "$image"
    fi | sed '/^$/d'
)
[ "${health[0]:-}" = CMD ] || fail "the image has no health check"
for attempt in $(seq 120); do
    if inside env "PERTURBSCOPE_HTTP_PORT=$http" "${health[@]:1}" >/dev/null 2>&1; then break; fi
    [ "$attempt" != 120 ] || fail "not ready after $attempt tries"
    sleep 0.5
done
say "ready after $((($(date +%s%N) - start) / 1000000)) ms"

inside python3 - "$http" "$grpc" <"$root/scripts/image_check.py"

if [ "$engine" = docker ]; then
    docker stop --time 40 "$container" >/dev/null
    [ "$(docker inspect --format '{{.State.ExitCode}}' "$container")" = 0 ] || fail "the service did not end cleanly"
else
    stop
    written="$(find "$mount" -xdev -newer "$marker" \( -type f -o -type l \) -not -path "$mount/tmp/*" -not -path "$mount/run/*")"
    [ -z "$written" ] || fail "the service wrote outside /tmp: $written"
    echo "  ok   nothing was written outside /tmp: a read-only root will do"
fi
say "stopped; image test passed"
