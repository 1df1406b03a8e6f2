"""`ztna top`: what goes on at this host's daemons, live. Reads their admin ports; ztna.overview says what is shown."""

from __future__ import annotations

import json
import os
import select
import signal
import sys
import termios
import time
import tty
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path

import click
import msgspec
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from ztna import overview
from ztna.cli import admin
from ztna.cli.ending import interruptible
from ztna.cli.status import COLOURS, UNREADABLE, WIDTH_PIPED, asked_of, printable
from ztna.errors import ProtocolError, ZtnaError
from ztna.jsontypes import from_json
from ztna.overview import Json, Row

INTERVAL_SECONDS = 2.0
ANSWER_SECONDS = 2.0
CONNECTORS_COLUMNS = 100
"""A terminal that wide has room for the connectors."""
LINES_AROUND = 4
"""Lines that are no service: the heads, and what is left out."""
KEYS = "q ends, s sorts by the next column"


class Snapshot(msgspec.Struct, frozen=True):
    """What all daemons said at one time (Unix seconds): their states, or why one said nothing."""

    at: float
    states: dict[str, Json]
    errors: dict[str, str]
    rows: list[Row]


@click.command()
@click.option(
    "--config",
    "files",
    multiple=True,
    type=click.Path(path_type=Path),
    help="Configurations of the daemons to ask; without any, those at the default admin ports.",
)
@click.option(
    "--interval",
    "-i",
    type=click.FloatRange(0.2, 3600),
    default=INTERVAL_SECONDS,
    show_default=True,
    help="Seconds between two looks.",
)
@click.option(
    "--sort",
    type=click.Choice(overview.SORTS),
    default="service",
    show_default=True,
    help="What comes first.",
)
@click.option("--once", is_flag=True, help="Look twice, one interval apart, print it and end.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object a look, each on a line.")
def top(files: tuple[Path, ...], interval: float, sort: str, once: bool, as_json: bool) -> None:
    """Show services, sessions, flows, rates, paths and round trips of this host's daemons, live; q or Ctrl-C ends.

    Bytes a second are of TCP flows at an agent, and of what a relay forwards. Exit status 1 with --once when no
    daemon answers.
    """
    watch = Watch(asked_of(files), only_running=not files)
    if not (once or as_json) and not (sys.stdin.isatty() and sys.stdout.isatty()):
        click.echo("no terminal: shown once; --json follows without one", err=True)
        once = True
    try:
        if once:
            sys.exit(_once(watch, interval, sort, as_json))
        with suppress(KeyboardInterrupt), interruptible():
            if as_json:
                for snapshot in watch.follow(interval, time.sleep):
                    click.echo(_json(snapshot, sort))
                    sys.stdout.flush()
            else:
                _live(watch, interval, sort)
    except BrokenPipeError:
        # Whoever read it has had enough; Python would complain once more when it flushes.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


class Watch:
    """Looks at the daemons again and again."""

    def __init__(self, asked: Sequence[tuple[str, str]], *, only_running: bool) -> None:
        """`asked` has name and admin address of each; with `only_running` those that never answered are left out."""
        names = Counter(name for name, _ in asked)
        self._asked = [(name if names[name] == 1 else f"{name} {at}", at) for name, at in asked]
        self._only_running = only_running
        self._seen: set[str] = set()
        self._looked_at = 0.0
        self._rows: dict[str, Row] = {}

    def look(self) -> Snapshot:
        """Ask all daemons at once."""
        states: dict[str, Json] = {}
        errors: dict[str, str] = {}
        with ThreadPoolExecutor(max_workers=max(1, len(self._asked))) as pool:
            for (name, at), said in zip(self._asked, pool.map(_ask, self._asked), strict=True):
                if not isinstance(said, str):
                    states[name] = said
                    self._seen.add(name)
                elif not self._only_running or name in self._seen:
                    errors[name] = f"{at}: {said}"
        now = time.monotonic()
        found = overview.with_rates(overview.rows(states), self._rows, now - self._looked_at)
        self._looked_at, self._rows = now, {row.service: row for row in found}
        return Snapshot(time.time(), states, errors, found)

    def follow(self, interval: float, wait: Callable[[float], object]) -> Iterator[Snapshot]:
        """Return one look after the other."""
        while True:
            yield self.look()
            wait(interval)


def _ask(asked: tuple[str, str]) -> Json | str:
    """Return what a daemon says of itself, or why it says nothing that can be shown."""
    try:
        _, body = admin.fetch(asked[1], "/status", seconds=ANSWER_SECONDS)
        state = from_json(body, dict)
        if "readiness" not in state:
            return str(state.get("error", admin.STRANGER))
        alone = {asked[0]: state}
        overview.rows(alone), list(overview.daemons(alone))
    except (KeyError, TypeError, AttributeError):
        return UNREADABLE
    except ProtocolError as error:
        return f"{admin.STRANGER}: {error}"
    except (ValueError, ZtnaError) as error:
        return str(error)
    return state


def _once(watch: Watch, interval: float, sort: str, as_json: bool) -> int:
    watch.look()
    time.sleep(interval)
    snapshot = watch.look()
    if as_json:
        click.echo(_json(snapshot, sort))
    else:
        width = None if sys.stdout.isatty() else WIDTH_PIPED
        console = Console(width=width, highlight=False)
        console.print(_shown(snapshot, sort, console.width, len(snapshot.rows)))
    return 0 if snapshot.states else 1


def _json(snapshot: Snapshot, sort: str) -> str:
    return json.dumps(
        {
            "at": round(snapshot.at, 3),
            "daemons": {name: ready for name, ready, _ in overview.daemons(snapshot.states)},
            "errors": snapshot.errors,
            "services": msgspec.to_builtins(overview.in_order(snapshot.rows, sort)),
        }
    )


def _live(watch: Watch, interval: float, sort: str) -> None:
    """Follow on the terminal's other screen until q or Ctrl-C; leaves the terminal as it was."""
    console = Console(highlight=False)
    keys = _Keys(sort)
    with _unbuffered_keys(), Live(console=console, screen=True, auto_refresh=False) as live:

        def show() -> None:
            room = console.size.height - LINES_AROUND - len(snapshot.states) - len(snapshot.errors)
            live.update(_shown(snapshot, keys.sort, console.width, max(1, room), KEYS), refresh=True)

        snapshot = watch.look()
        before = signal.signal(signal.SIGWINCH, lambda _number, _frame: show())
        try:
            while not keys.ended:
                show()
                if keys.wait(interval):
                    snapshot = watch.look()
        finally:
            signal.signal(signal.SIGWINCH, before)


class _Keys:
    """What was typed."""

    def __init__(self, sort: str) -> None:
        self.sort = sort
        self.ended = False
        self._due = time.monotonic()

    def wait(self, interval: float) -> bool:
        """Wait for a key or for the next look; say whether that is due."""
        if self._due <= time.monotonic():
            self._due = time.monotonic() + interval
        readable, _, _ = select.select([sys.stdin], [], [], max(0.0, self._due - time.monotonic()))
        if not readable:
            return True
        typed = os.read(sys.stdin.fileno(), 16)
        self.ended = not typed or b"q" in typed.lower()
        if b"s" in typed:
            self.sort = overview.SORTS[(overview.SORTS.index(self.sort) + 1) % len(overview.SORTS)]
        return False


@contextmanager
def _unbuffered_keys() -> Iterator[None]:
    """Have keys come as they are typed, unseen."""
    fd = sys.stdin.fileno()
    kept = termios.tcgetattr(fd)
    try:
        tty.setcbreak(fd)
        yield
    finally:
        termios.tcsetattr(fd, termios.TCSADRAIN, kept)


def _shown(snapshot: Snapshot, sort: str, width: int, room: int, keys: str = "") -> Group:
    """Return the screen: a line a daemon, then the services, at most `room` of them."""
    head = Text(f"{time.strftime('%H:%M:%S', time.localtime(snapshot.at))}  by {sort}", "dim")
    if keys:
        head.append(f"   {keys}")
    lines = [head, *_daemon_lines(snapshot)]
    found = overview.in_order(snapshot.rows, sort)
    parts: list[RenderableType] = [*(_one_line(line) for line in lines), _table(found[:room], width)]
    if len(found) > room:
        parts.append(Text(f"... and {len(found) - room} more", "dim"))
    return Group(*parts)


def _daemon_lines(snapshot: Snapshot) -> Iterator[Text]:
    for name, ready, trouble in overview.daemons(snapshot.states):
        line = Text(f"{name} ", "bold")
        line.append("ready" if ready else "not ready", "green" if ready else "red")
        if trouble:
            line.append(f"  {printable(trouble)}", "yellow")
        yield line
    for name, error in snapshot.errors.items():
        yield Text(printable(f"{name} does not answer: {error}"), "red")
    if not snapshot.states and not snapshot.errors:
        yield Text("no daemon answers at the default admin ports; --config FILE says where one is", "red")


def _one_line(text: Text) -> Text:
    text.no_wrap, text.overflow = True, "ellipsis"
    return text


def _table(found: Sequence[Row], width: int) -> Table:
    table = Table(box=None, padding=(0, 1, 0, 0), header_style="bold", expand=False)
    table.add_column("service", no_wrap=True, overflow="ellipsis", min_width=8)
    table.add_column("address", no_wrap=True)
    table.add_column("health", no_wrap=True)
    for title in ("sess", "flows", "out/s", "in/s", "relay/s"):
        table.add_column(title, no_wrap=True, justify="right")
    table.add_column("rtt ms", no_wrap=True, justify="right")
    table.add_column("path", no_wrap=True)
    if width >= CONNECTORS_COLUMNS:
        table.add_column("connectors", no_wrap=True, overflow="ellipsis")
    for row in found:
        cells = [
            Text(printable(row.service)),
            Text(row.address or ""),
            Text(row.health or "", COLOURS.get(row.health or "", "")),
            Text(str(row.sessions or "")),
            Text(str(row.flows or "")),
            *(Text(overview.short(each)) for each in (row.sent_per_s, row.received_per_s, row.relayed_per_s)),
            Text("" if row.rtt_ms is None else f"{row.rtt_ms:.1f}"),
            Text(row.path or ""),
        ]
        if width >= CONNECTORS_COLUMNS:
            cells.append(Text(printable(", ".join(row.connectors))))
        table.add_row(*cells)
    return table
