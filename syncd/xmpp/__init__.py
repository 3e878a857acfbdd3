"""An XMPP client stream (RFC 6120, RFC 6121) without I/O: bytes in, events out; knows no files.

`jid`, `xml` and `stanza` are the vocabulary, `stream` the order of things from header to
footer, with `login` (`sasl` underneath) and `sm`, which lets a session outlive its connection;
`disco` and `caps` tell who can what. `syncd.link` drives all of it.
"""
