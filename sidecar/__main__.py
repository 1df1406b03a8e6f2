"""`python -m sidecar` is `ztna-sidecar`."""

from sidecar.main import main

main(prog_name="ztna-sidecar")
