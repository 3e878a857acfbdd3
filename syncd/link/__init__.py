"""The trio side of our XMPP stream; knows no files.

`connect` goes from an account to a bound stream (TCP, TLS with the right certificate, login),
`session` is one stream's life, `client` keeps having one and knows which peers are there. What
may come when, and what it means, is decided in `syncd.xmpp`, which does no I/O.
"""
