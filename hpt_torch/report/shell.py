"""The HTML document around a page's body: one file that loads nothing."""

from __future__ import annotations

import base64
import hashlib
from html import escape
from pathlib import Path

_FOLDER = Path(__file__).parent
_DOCUMENT = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'; \
{scripts}img-src data:; base-uri 'none'; form-action 'none'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{title} · hpt_torch</title>
<link rel="icon" href="data:,">
<style>{style}</style>
</head>
<body>
{body}
{script}</body>
</html>
"""


def document(*, title: str, body: str, script: str = "") -> str:
    """The whole document. title: plain text; body: HTML; script: the one that may run.

    The browser itself refuses to load anything, and to run any script but this, whatever slips in.
    """
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return _DOCUMENT.format(
        title=escape(title),
        style=(_FOLDER / "page.css").read_text(encoding="utf-8"),
        scripts=f"script-src 'sha256-{digest}'; " if script else "",
        body=body,
        script=f"<script>{script}</script>\n" if script else "",
    )
