"""A headless Chromium that notes whatever a page of ours must never do."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

CHROMIUM = "/usr/bin/chromium"
ARGUMENTS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
LAUNCH = {"executable_path": CHROMIUM, "args": ARGUMENTS}
_TELL_VIOLATIONS = """
addEventListener("securitypolicyviolation", (event) => console.error("CSP: " + event.violatedDirective));
"""


@dataclass
class Watch:
    """What a page asked for and complained of. Works for playwright's pages of both kinds."""

    errors: list[str] = field(default_factory=list)
    origins: set[str] = field(default_factory=set)

    def over(self, page: Any) -> None:
        """Note everything from now on."""
        page.on("console", lambda message: self._hear(message.type, message.text))
        page.on("pageerror", lambda error: self.errors.append(f"exception: {error}"))
        page.on("dialog", lambda dialog: self.errors.append(f"dialog: {dialog.message}"))
        page.on(
            "request",
            lambda request: self.origins.add("{0.scheme}://{0.netloc}".format(urlsplit(request.url))),
        )

    def _hear(self, kind: str, text: str) -> None:
        if kind in ("error", "warning"):
            self.errors.append(f"{kind}: {text}")


def tell_violations() -> str:
    """Return the script that a context runs before any page's own, so that broken policies are heard of."""
    return _TELL_VIOLATIONS
