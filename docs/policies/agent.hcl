# ztna-sidecar agent: reads catalog and leases. What it may reach its certificate says, not this policy.

service_prefix "" {
  policy = "read"
}

node_prefix "" {
  policy = "read"
}

key_prefix "ztna/vip/" {
  policy = "read"
}

key "ztna/schema" {
  policy = "read"
}

# Its own report of an address conflict, bound to a session so that it goes when the agent goes.
key "ztna/conflict/laptop-1" {
  policy = "write"
}

session_prefix "" {
  policy = "write"
}
