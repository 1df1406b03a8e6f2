"""How a line of log looks: JSON, or for people; event names with fields. ztna.telemetry has who writes them."""

from __future__ import annotations

import logging
import sys
import time
from typing import Any, TextIO

import msgspec

from ztna.config import LogConfig
from ztna.jsontypes import Secret, to_json

HIDDEN = "***"

_LEVELS = {"debug": logging.DEBUG, "info": logging.INFO, "warning": logging.WARNING, "error": logging.ERROR}
_COLOURS = {"DEBUG": "\x1b[2m", "WARNING": "\x1b[33m", "ERROR": "\x1b[31m"}
_ROOTS = ("ztna", "sidecar", "dnsd", "relay")


def configure(config: LogConfig, stream: TextIO | None = None) -> None:
    """Send all logs to the stream (stderr), human on a terminal and JSON lines otherwise unless told.

    Of libraries only warnings and errors are written, whatever our level.
    """
    out = stream if stream is not None else sys.stderr
    human = config.format == "human" or (config.format == "auto" and out.isatty())
    handler = logging.StreamHandler(out)
    handler.setFormatter(_Human(colour=out.isatty()) if human else _Json())
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(logging.WARNING)
    for name in _ROOTS:
        logging.getLogger(name).setLevel(_LEVELS[config.level])


class _Json(logging.Formatter):
    """One JSON object a line: time (RFC 3339, UTC), level, logger, event, then the fields."""

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {
            "time": utc(record.created),
            "level": record.levelname.lower(),
            "logger": record.name,
            "event": record.getMessage(),
        }
        for name, value in _fields(record, self).items():
            line.setdefault(name, value)
        return msgspec.json.encode(line).decode()


class _Human(logging.Formatter):
    """Local time, level, event and `key=value`; what could break a line is escaped."""

    def __init__(self, *, colour: bool) -> None:
        super().__init__()
        self._colour = colour

    def format(self, record: logging.LogRecord) -> str:
        fields = _fields(record, self)
        traceback = fields.pop("traceback", None)
        clock = time.strftime("%H:%M:%S", time.localtime(record.created))
        text = f"{clock}.{int(record.msecs):03d} {record.levelname:<7} {_one_line(record.getMessage())}"
        text += "".join(f" {name}={_quoted(value)}" for name, value in fields.items())
        if self._colour and record.levelname in _COLOURS:
            text = f"{_COLOURS[record.levelname]}{text}\x1b[0m"
        if traceback:
            # The text of an error may be a peer's.
            text = "\n".join((text, *map(_one_line, str(traceback).split("\n"))))
        return text


def _fields(record: logging.LogRecord, formatter: logging.Formatter) -> dict[str, object]:
    """Return the event's fields as JSON has them, and the traceback when there is one."""
    fields = {name: _told(value) for name, value in getattr(record, "fields", {}).items()}
    if record.exc_info:
        fields["traceback"] = formatter.formatException(record.exc_info)
    return fields


def _told(value: object) -> object:
    if isinstance(value, Secret):
        return HIDDEN
    if value is None or isinstance(value, (bool, int, float)):
        return value
    return str(value)


def _quoted(value: object) -> str:
    text = str(value)
    if text and text.isprintable() and not any(c in text for c in ' "='):
        return text
    return to_json(text).decode()


def _one_line(text: str) -> str:
    return text if text.isprintable() else to_json(text).decode()


def utc(seconds: float) -> str:
    """Return Unix seconds as RFC 3339 in UTC, to the millisecond."""
    whole = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(seconds))
    return f"{whole}.{int(seconds % 1 * 1000):03d}Z"
