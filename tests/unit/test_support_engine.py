"""tests.support.docker and distribution where they share with other test processes, without an engine."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.support import distribution, docker
from tests.support.lab import until

DOCKERD = """#!/bin/sh
echo $$ > "$PLACE/started"
exec sleep 600
"""


def test_an_engine_that_does_not_answer_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, text in {"dockerd": DOCKERD, "docker": "#!/bin/sh\nexit 1\n"}.items():
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setenv("PLACE", str(tmp_path))
    monkeypatch.setattr(docker, "_OURS", tmp_path)
    asked = []

    def answers(host: str | None) -> bool:
        """Never; and whoever waits is interrupted once the engine runs."""
        asked.append(host)
        until(
            "started", lambda: (tmp_path / "started").exists() and (tmp_path / "started").read_text().strip()
        )
        raise KeyboardInterrupt

    monkeypatch.setattr(docker, "_answers", answers)
    with pytest.raises(KeyboardInterrupt):
        docker._start()
    assert asked and not Path(f"/proc/{(tmp_path / 'started').read_text().strip()}").exists()


def test_wheels_that_another_process_got_meanwhile_are_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both found none, and one was quicker."""
    folder, lock = tmp_path / "peers", tmp_path / "lock.txt"
    lock.write_text("click==8.0")
    monkeypatch.setenv("ZTNA_PEERS_DIR", str(folder))

    def pip(verb: str, *words: str | Path) -> None:
        ours = Path(words[words.index("--dest") + 1])
        ours.mkdir()
        (ours / "click.whl").touch()
        theirs = folder / f"wheels-{distribution._key(lock)}"
        theirs.mkdir()
        (theirs / "click.whl").touch()

    monkeypatch.setattr(distribution, "pip", pip)
    kept = distribution._kept("wheels", lock)
    assert [path.name for path in folder.iterdir()] == [kept.name]
    assert [path.name for path in kept.iterdir()] == ["click.whl"]
