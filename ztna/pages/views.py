"""The page of each daemon, by what its status is. Pure."""

from __future__ import annotations

from ztna.pages import page_agent, page_connector, page_dnsd, page_relay
from ztna.pages.parts import View, head, refusals
from ztna.pages.seen import Agent, Connector, Daemon, Dnsd, Relay


def view(seen: Daemon, earlier: Daemon | None = None) -> View:
    """Return the page of a daemon; with an `earlier` status of the same, rates are of the time since."""
    match seen:
        case Relay():
            return page_relay.view(seen)
        case Dnsd():
            return page_dnsd.view(seen, earlier if isinstance(earlier, Dnsd) else None)
        case Connector():
            return page_connector.view(seen)
        case Agent():
            return page_agent.view(seen)
        case _:
            return View(seen.daemon, {"head": head(seen, seen.daemon, [])} | refusals(seen))
