# Beside connector.hcl, for a connector with checks of `runner: consul`: it reads which version Consul's agent has, and
# what that finds of the checks on its node. Name the node to narrow this.

agent_prefix "" {
  policy = "read"
}

node_prefix "" {
  policy = "read"
}
