# ztna-dnsd that only answers (dnsd.keeper: false).

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
