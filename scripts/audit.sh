#!/usr/bin/env bash
# Looks up the pinned packages of the service among known vulnerabilities (pip-audit). Exit code 1: something is known, or
# a package could not be looked up: a network without the data passes nothing.
#
#   scripts/audit.sh [FILE...]     default requirements/serving.txt requirements/serving-gpu.txt
#
#   SERVICE   pypi (default), osv: whose data; both need the network
#   PYTHON    an interpreter with pip-audit             default .venv/bin/python, or python3
set -euo pipefail

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
cd "$root"
[ $# -gt 0 ] || set -- requirements/serving.txt requirements/serving-gpu.txt
python="${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python3)}"

status=0
for file in "$@"; do
    [ -f "$file" ] || { printf 'error: %s does not exist\n' "$file" >&2; exit 2; }
    printf '+ pip-audit %s\n' "$file" >&2
    # Everything is pinned, so nothing has to be resolved or installed.
    "$python" -m pip_audit --disable-pip --no-deps --requirement "$file" --vulnerability-service "${SERVICE:-pypi}" \
        --progress-spinner off --strict || status=1
done
exit "$status"
