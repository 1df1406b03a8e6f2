# `ztna leases`: reads the leases and asks the keeper for changes; it writes no lease itself.

key_prefix "ztna/vip/" {
  policy = "read"
}

key_prefix "ztna/vip/wish/" {
  policy = "write"
}

key_prefix "ztna/conflict/" {
  policy = "read"
}

key "ztna/schema" {
  policy = "read"
}

service_prefix "" {
  policy = "read"
}

node_prefix "" {
  policy = "read"
}
