"""`python -m relay` is `ztna-relay`."""

from relay.main import main

main()
