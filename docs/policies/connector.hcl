# ztna-sidecar connector: one `service` block for each service that it fronts, wherever that is defined, and no other.
# It reads leases and cannot write one, so a stolen token points no other name at its holder.

service "echo-service" {
  policy = "write"
}

service "web-app" {
  policy = "write"
}

service "db" {
  policy = "write"
}

key_prefix "ztna/vip/" {
  policy = "read"
}

key "ztna/schema" {
  policy = "read"
}
