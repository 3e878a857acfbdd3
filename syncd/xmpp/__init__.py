"""An XMPP client stream (RFC 6120, RFC 6121); knows nothing of files.

`jid`, `xml`, `stanza`, `sasl`, `stream`, `disco` and `contacts` are sans-IO: bytes in,
events out. `connect` reaches the server (TCP, TLS), `session` is one stream's life on trio,
and the client that keeps having one.
"""
