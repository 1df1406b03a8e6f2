"""What a bug report leaves out, wherever it was written; a whole one is made in tests/e2e."""

from __future__ import annotations

import pytest

from ztna.cli.debug import clean


@pytest.mark.parametrize(
    ("text", "secret"),
    [
        ("headers: ['Authorization: Bearer s3cr3t', 'Host: web']", "s3cr3t"),
        ("  - 'X-Api-Key: s3cr3t'\n  - 'Host: web'", "s3cr3t"),
        ('{"headers": ["cookie: id=s3cr3t; a=b"], "host": "web"}', "s3cr3t"),
        ("crl_url: http://joe:s3cr3t@web/crl", "s3cr3t"),
        ("consul_token: 6f1b2a34-0000-0000-0000-000000000001, host web", "6f1b2a34"),
    ],
)
def test_what_shows_who_asks_is_left_out(text: str, secret: str) -> None:
    assert secret not in clean(text) and "***" in clean(text)
    assert "web" in clean(text), "and nothing beside it"


def test_what_only_looks_like_it_stays() -> None:
    text = "srv://web.example/a@b cookies: 3 spiffe://ztna/laptop fingerprint 6f1b2a34"
    assert clean(text) == text
