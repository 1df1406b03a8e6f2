"""The bytes of protocol.md and nothing else: hostile bytes give a value or ProtocolError."""
