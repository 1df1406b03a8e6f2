# ztna-dnsd that may be elected keeper of the leases (dnsd.keeper: true, the default).
# It reads the whole catalog, and nobody else may write below ztna/vip/ what it writes there.

service_prefix "" {
  policy = "read"
}

node_prefix "" {
  policy = "read"
}

key_prefix "ztna/vip/" {
  policy = "write"
}

key "ztna/schema" {
  policy = "write"
}

# Its lock on ztna/vip/keeper hangs on a session of the node it runs on. Name that node to narrow this.
session_prefix "" {
  policy = "write"
}
