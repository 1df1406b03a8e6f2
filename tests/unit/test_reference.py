"""docs/reference/ says what the code says."""

from __future__ import annotations

import pytest

from tests.reference import markdown
from tests.reference.__main__ import DIRECTORY, PAGES


@pytest.mark.parametrize("name", PAGES)
def test_the_page_is_what_the_code_says(name: str) -> None:
    assert (DIRECTORY / name).read_text() == PAGES[name](), "run `make reference`"


def test_no_other_page_passes_for_a_made_one() -> None:
    assert {path.name for path in DIRECTORY.iterdir()} == set(PAGES)


def test_words_mean_themselves_in_a_page() -> None:
    assert markdown.text("relay.<name> or *, `<code>` stays") == "relay.&lt;name> or \\*, `<code>` stays"
    assert markdown.table(("a",), [("`x|y`",)]).endswith("| `x\\|y` |")
    assert markdown.anchor("`connector.routes[]`, `x.api_state`") == "connectorroutes-xapi_state"


def test_code_of_nothing_is_nothing() -> None:
    assert (markdown.code(""), markdown.code(5)) == ("", "`5`")
