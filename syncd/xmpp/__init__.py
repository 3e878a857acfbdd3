"""An XMPP client stream (RFC 6120, RFC 6121) without I/O: bytes in, events out; knows no files.

`jid`, `xml` and `stanza` are the vocabulary, `sasl` the login, `stream` the order of things
from header to footer, `disco` and `contacts` who is there and can what. `syncd.link` drives it.
"""
