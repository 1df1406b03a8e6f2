"""The `ztna` command: it starts the daemons as processes and never imports them."""
