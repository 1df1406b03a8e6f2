"""What the daemons agree on: names, identities, wire formats, and the doors to QUIC, DNS and Consul."""
