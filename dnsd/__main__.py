"""`python -m dnsd` is `ztna-dnsd`."""

from dnsd.main import main

main()
