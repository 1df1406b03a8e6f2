"""What programs beside an agent do in the container tests; a script of the standard library alone.

container_client.py once HOST       one download, checked by hash, and datagrams that come back
container_client.py steady HOST     a conversation over TCP and one over UDP until its stdin ends; prints JSON
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import select
import socket
import sys
import time

HTTP_PORT, TCP_PORT, UDP_PORT = 8080, 7000, 7007
DOWNLOAD_BYTES, SEED = 8 << 20, 7
DATAGRAMS = 50
WORD_BYTES = 1024
PACE_SECONDS = 0.02
PATIENCE_SECONDS = 25.0


def once(host: str) -> dict[str, object]:
    """Return what a download hashes to, who served it, and how many of the datagrams came back as they were sent."""
    digest, count = hashlib.sha256(), 0
    with socket.create_connection((host, HTTP_PORT), PATIENCE_SECONDS) as sock:
        sock.sendall(b"GET /bytes/%d/%d HTTP/1.0\r\n\r\n" % (DOWNLOAD_BYTES, SEED))
        with sock.makefile("rb") as stream:
            while stream.readline() != b"\r\n":
                pass
            while data := stream.read(1 << 16):
                digest.update(data)
                count += len(data)
    label = _get(host, "/").removeprefix("hello from ").strip()
    return {"bytes": count, "sha256": digest.hexdigest(), "label": label, "datagrams": _datagrams(host)}


def _get(host: str, path: str) -> str:
    with socket.create_connection((host, HTTP_PORT), PATIENCE_SECONDS) as sock:
        sock.sendall(b"GET %s HTTP/1.0\r\n\r\n" % path.encode())
        with sock.makefile("rb") as stream:
            return stream.read().partition(b"\r\n\r\n")[2].decode()


def _datagrams(host: str) -> int:
    """Send datagrams one after the other, each once more when its answer is lost, and count the right answers."""
    right = 0
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.connect((host, UDP_PORT))
        sock.settimeout(2.0)
        for _ in range(DATAGRAMS):
            sent = os.urandom(WORD_BYTES)
            for _ in range(2):
                try:
                    sock.send(sent)
                    if sock.recv(2 * WORD_BYTES).endswith(sent):
                        right += 1
                        break
                except OSError:
                    continue
    return right


def steady(host: str) -> dict[str, object]:
    """Say a word at a time and wait for its echo; return how many came back over each, and the longest silence."""
    tcp = socket.create_connection((host, TCP_PORT), PATIENCE_SECONDS)
    udp = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    udp.connect((host, UDP_PORT))
    udp.setblocking(False)
    heard = {"tcp": 0, "udp": 0, "wrong": 0}
    longest = 0.0
    print("talking", flush=True)
    while not select.select([sys.stdin], [], [], PACE_SECONDS)[0]:
        word = os.urandom(WORD_BYTES)
        begun = time.monotonic()
        tcp.sendall(word)
        with contextlib.suppress(OSError):  # refused while nobody serves; counted as not heard
            udp.send(word)
        echo = b""
        while len(echo) < WORD_BYTES:
            more = tcp.recv(WORD_BYTES - len(echo))
            if not more:
                raise ConnectionError("the conversation was ended by the other side")
            echo += more
        longest = max(longest, time.monotonic() - begun)
        heard["tcp" if echo == word else "wrong"] += 1
        heard["udp"] += _drained(udp)
    return {**heard, "longest_s": round(longest, 2)}


def _drained(udp: socket.socket) -> int:
    count = 0
    while True:
        try:
            udp.recv(2 * WORD_BYTES)
        except OSError:
            return count
        count += 1


if __name__ == "__main__":
    print(json.dumps({"once": once, "steady": steady}[sys.argv[1]](sys.argv[2])), flush=True)
