#!/usr/bin/env bash
# Checks the pinned packages of the service for known vulnerabilities (pip-audit). Exit code 1 means that one is known, or
# that a package could not be looked up, so the check fails without a network.
#
#   scripts/audit.sh [FILE...]     default requirements/serving.txt requirements/serving-gpu.txt
#
#   SERVICE   database to ask: pypi (default) or osv; both need the network
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
    # All packages are pinned, so nothing has to be resolved or installed.
    "$python" -m pip_audit --disable-pip --no-deps --requirement "$file" --vulnerability-service "${SERVICE:-pypi}" \
        --progress-spinner off --strict || status=1
done
exit "$status"
