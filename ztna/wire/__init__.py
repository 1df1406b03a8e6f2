"""The bytes of protocol.md and nothing else: one codec a module, hostile bytes give a value or ProtocolError."""
