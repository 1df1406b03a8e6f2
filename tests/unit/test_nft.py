"""ztna.nft: what it says when it cannot, and that it takes nothing once closed."""

from __future__ import annotations

import pytest

from ztna import nft
from ztna.nft import Nft, NftError


def test_without_the_library_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nft, "LIBRARY", "libabsent.so.1")
    with pytest.raises(NftError, match=r"libabsent\.so\.1"):
        Nft()


def test_nft_tells_what_is_wrong_and_takes_nothing_once_closed() -> None:
    try:
        context = Nft()
    except NftError as error:
        pytest.skip(str(error))
    with pytest.raises(NftError, match="nft: Error"):
        context.run("this is no command")
    context.close()
    context.close()
    with pytest.raises(NftError, match="closed"):
        context.run("list tables")
