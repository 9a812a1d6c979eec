#!/usr/bin/env bash
# Checks the pinned packages of the service for known vulnerabilities (pip-audit), prints what it found and writes it down
# with date, version of the tool and hashes of the files, so that a release can show what was known when it was made.
#
#   scripts/audit.sh [FILE...]     default requirements/serving.txt requirements/serving-gpu.txt
#
#   SERVICE   database to ask: pypi (default) or osv; both need the network
#   PYTHON    an interpreter with pip-audit             default .venv/bin/python, or python3
#   REPORT    file to write                             default runs/audit/DATE.json
#
# Exit code 0: every package was looked up and none has a known vulnerability. 1: one has. 3: not all could be looked up,
# as without a network; the report then says "incomplete", which is no finding at all. 2: wrong use.
set -euo pipefail

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
cd "$root"
[ $# -gt 0 ] || set -- requirements/serving.txt requirements/serving-gpu.txt
python="${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python3)}"
answers="$(mktemp -d)"
trap 'rm -rf "$answers"' EXIT

number=0
for file in "$@"; do
    [ -f "$file" ] || { printf 'error: %s does not exist\n' "$file" >&2; exit 2; }
    printf '+ pip-audit %s\n' "$file" >&2
    # All packages are pinned, so nothing has to be resolved or installed. What it could not do is read from its answer.
    "$python" -m pip_audit --disable-pip --require-hashes --requirement "$file" --progress-spinner off \
        --vulnerability-service "${SERVICE:-pypi}" --format json \
        >"$answers/$number.json" 2>"$answers/$number.err" || true
    number=$((number + 1))
done
tool="$("$python" -m pip_audit --version 2>/dev/null || echo 'pip-audit, not installed')"

"$python" - "$answers" "$tool" "${SERVICE:-pypi}" "${REPORT:-}" "$@" <<'PYTHON'
import datetime, hashlib, json, pathlib, sys

answers, tool, service, report, *files = sys.argv[1:]
now = datetime.datetime.now(datetime.timezone.utc).replace(microsecond=0)
document = {"date": now.isoformat().replace("+00:00", "Z"), "tool": tool, "service": service, "result": "", "files": []}
for number, name in enumerate(files):
    content = pathlib.Path(name).read_bytes()
    entry = {"file": name, "sha256": hashlib.sha256(content).hexdigest(), "looked_up": 0, "not_looked_up": [], "found": []}
    try:
        packages = json.loads(pathlib.Path(answers, f"{number}.json").read_text())["dependencies"]
    except (ValueError, KeyError):  # it ended with an error instead
        lines = pathlib.Path(answers, f"{number}.err").read_text().strip().splitlines()
        entry["error"] = lines[-1] if lines else "pip-audit gave no answer"
        packages = []
    for package in packages:
        if "skip_reason" in package:
            entry["not_looked_up"].append({"name": package["name"], "why": package["skip_reason"]})
        else:
            entry["looked_up"] += 1
            for flaw in package["vulns"]:
                keep = {key: flaw[key] for key in ("id", "aliases", "fix_versions") if key in flaw}
                entry["found"].append({"name": package["name"], "version": package["version"], **keep})
    document["files"].append(entry)
found = [flaw for entry in document["files"] for flaw in entry["found"]]
complete = all(entry["looked_up"] and not entry["not_looked_up"] and "error" not in entry for entry in document["files"])
document["result"] = "vulnerable" if found else "clean" if complete else "incomplete"
path = pathlib.Path(report or f"runs/audit/{now:%Y-%m-%d}.json")
path.parent.mkdir(parents=True, exist_ok=True)
path.write_text(json.dumps(document, indent=1) + "\n")

print(f"audit of {document['date']}, {tool}, {service}: {document['result']}")
for entry in document["files"]:
    print(f"  {entry['file']}: {entry['looked_up']} looked up, {len(entry['not_looked_up'])} not, {len(entry['found'])} vulnerabilities")
    if "error" in entry:
        print(f"    {entry['error']}")
    for flaw in entry["found"]:
        fixed = ", ".join(flaw.get("fix_versions", [])) or "no version"
        print(f"    {flaw['name']} {flaw['version']}: {flaw['id']}, fixed in {fixed}")
if not complete:
    print("not every package could be looked up, so this is no clean bill: run it where the database can be reached")
print(f"written to {path}")
sys.exit(1 if found else 0 if complete else 3)
PYTHON
