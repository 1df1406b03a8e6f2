"""`make soak`: a mesh under load and disturbance for a while; exit 1 when something leaked or was misdelivered.

python -m tests.soak [--seconds N] [--agents N] [--connectors N]
"""

from __future__ import annotations

import argparse
import logging
import resource
import sys
import tempfile
from pathlib import Path

import uvloop

from tests.soak.mesh import Size
from tests.soak.run import Verdict, soak


def main() -> int:
    """Run it and print what came of it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--agents", type=int, default=200)
    parser.add_argument("--connectors", type=int, default=20)
    given = parser.parse_args()
    logging.disable(logging.ERROR)  # 220 daemons in one process: what counts is counted
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    with tempfile.TemporaryDirectory(prefix="ztna-soak-") as directory:
        size = Size(given.agents, given.connectors)
        verdict: Verdict = uvloop.run(soak(Path(directory), size, given.seconds))
    print("\n".join(verdict.told))
    for each in verdict.wrong:
        print(f"WRONG: {each}")
    return 1 if verdict.wrong else 0


sys.exit(main())
