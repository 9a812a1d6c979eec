"""The page on which a screen is uploaded in the browser."""

from __future__ import annotations

from importlib import resources

from perturbscope import __version__
from perturbscope.report.page import stylesheet
from serving.settings import ROOT, Settings

EXAMPLE = "/example.h5ad"
"""Path of a small screen to try the page with."""
EXAMPLE_FILE = ROOT / "data" / "papalexi2021_heldout.h5ad"
"""Cells that the default model was not fine-tuned on; a server that was installed without it offers no example."""
PAGE_HEADERS = {
    # A page may run its own script and talk to this server. It loads nothing from anywhere.
    "content-security-policy": "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; "
    "connect-src 'self'; form-action 'self'; img-src data:; base-uri 'none'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "cache-control": "no-store",
    "referrer-policy": "no-referrer",
}


def screen_page(settings: Settings) -> str:
    """Return the upload form, with this server's limits; it loads nothing else, and holds no data."""
    text = (resources.files("serving.http") / "screen.html").read_text(encoding="utf-8")
    for name, value in (
        ("STYLE", stylesheet()),
        ("MAX_BYTES", str(settings.max_body_bytes)),
        ("MAX_MEGABYTES", f"{settings.max_body_bytes / 2**20:,.0f}"),
        ("MAX_CELLS", f"{settings.max_cells:,}"),
        ("EXAMPLE", EXAMPLE if EXAMPLE_FILE.is_file() else ""),
        ("EXAMPLE_NAME", EXAMPLE_FILE.name),
        ("ASKS_FOR_KEY", "yes" if settings.keys else "no"),
        ("VERSION", __version__),
    ):
        text = text.replace("{{" + name + "}}", value)
    return text
