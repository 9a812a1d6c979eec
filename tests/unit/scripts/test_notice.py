"""NOTICE is what the pinned packages say, and names what they carry."""

from __future__ import annotations

import platform
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
SCRIPT = ROOT / "scripts" / "notice.py"


def pins(name: str) -> dict[str, str]:
    text = (ROOT / "requirements" / f"{name}.txt").read_text()
    return dict(re.findall(r"^([a-z0-9.-]+)==(\S+)", text, flags=re.MULTILINE))


def test_notice_names_each_pinned_package_at_its_version():
    text = (ROOT / "NOTICE").read_text()
    first = text.partition("\nPython packages\n")[2].partition("\n\n\n")[0]
    listed = dict(re.findall(r"^([a-z0-9.-]+) +(\d\S*) +\S", first, flags=re.MULTILINE))
    assert listed == pins("serving"), "run make notice"
    for name, version in pins("serving-gpu").items() - pins("serving").items():
        assert f"{name} {version}" in re.sub(r"\s+", " ", text)


@pytest.mark.skipif(
    (sys.platform, platform.machine()) != ("linux", "x86_64"), reason="wheels for other machines carry other libraries"
)
def test_notice_is_what_the_script_writes():
    result = subprocess.run([sys.executable, SCRIPT, "--check"], capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr


def test_notice_says_what_is_not_plain():
    text = re.sub(r"\s+", " ", (ROOT / "NOTICE").read_text())
    assert "state no licence in their metadata: resvg-py." in text
    assert "GCC RUNTIME LIBRARY EXCEPTION" in text
    for library in ("libgfortran", "libquadmath", "libgomp", "libscipy_openblas64_"):
        assert re.search(rf"{library}-\S+ \S+ .{{1,60}}(GPL|BSD)", text), library


def test_each_text_is_there_once():
    texts = re.split(r"\n\n\nText \d+\n=+\n\n", (ROOT / "NOTICE").read_text())[1:]
    assert len(texts) > 50
    (apache,) = [text for text in texts if "\nbentoml (LICENSE)" in text]
    owners, _, body = apache.partition("\n\n")
    assert {"tornado (LICENSE)", "opentelemetry-sdk (LICENSE)"} <= set(owners.splitlines())
    assert "    Copyright 2020 Atalaya Tech. Inc" in owners.splitlines()
    assert "Apache License" in body
    words = [" ".join(text.partition("\n\n")[2].split()) for text in texts]
    assert len(words) == len(set(words))


def test_a_library_that_nobody_has_looked_at_stops_it(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(SCRIPT.parent)
    import distributions
    import notice

    monkeypatch.setattr(notice, "LIBRARIES", {**distributions.LIBRARIES})
    monkeypatch.delitem(notice.LIBRARIES, "libzmq")
    if sys.platform != "linux":
        pytest.skip("wheels for other machines carry other libraries")
    with pytest.raises(SystemExit, match=r"pyzmq carries libzmq-\S+: name it"):
        notice.notice()


def test_pins_that_are_not_installed_stop_it(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(SCRIPT.parent)
    import distributions

    file = tmp_path / "pins.txt"
    file.write_text("numpy==1.0 \\\n    --hash=sha256:00\n")
    with pytest.raises(SystemExit, match=r"numpy 1\.0 and .* is installed"):
        list(distributions.pinned(file))
    file.write_text("not-installed-at-all==1.0\n")
    with pytest.raises(SystemExit, match="is not installed"):
        list(distributions.pinned(file))
