"""Keys and sealing: who the peer is, and that nobody else reads or changes a file.

The order in which they are read best: `signing` is an identity and the canonical bytes that it
signs, `identity` keeps it in a file; `kem` is the ephemeral key of one transfer, `handshake`
what offer and answer tell about it; `seal` is the bytestream itself, and `receipt` what both
ends say when it is through. `pins` decides about a peer by what it showed before, `words` is
what two people compare. All but `identity` are sans-IO. docs/sealing.md is the protocol with
every byte of it, its threat model and its test vectors.
"""
