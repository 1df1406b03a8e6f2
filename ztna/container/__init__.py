"""The container image: what it is built from, and what runs inside it beside the daemons (docs/containers.md)."""
