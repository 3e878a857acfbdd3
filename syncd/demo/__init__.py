"""A small XMPP server: what `syncctl demo` runs, and what breaks on purpose in the tests.

It is no part of a normal run. It speaks what a client of syncd needs (RFC 6120, RFC 6121,
XEP-0030, XEP-0199, XEP-0065's proxy) for the accounts of one domain on this machine, keeps
everything in memory, and has no connection to other servers, no stream management and no
offline storage. In reading order:

- `stream`: the server's side of one stream, from header to footer. Sans-IO.
- `login`: the server's side of SASL: SCRAM and PLAIN. Sans-IO.
- `presence`: who is online, who may see it; rosters and subscriptions. Sans-IO.
- `routing`: where each stanza goes. Sans-IO.
- `proxy65`: the SOCKS5 bytestreams proxy. `certificate`: a CA and a certificate on the spot.
- `connection`: one client's connection. `server`: `open_server`, all of it together.
- `faults`: what the server can be told to do wrong, after what real servers do.
"""
