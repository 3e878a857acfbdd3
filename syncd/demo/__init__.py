"""A small XMPP server: what `syncctl demo` runs, and what breaks on purpose in the tests.

It is no part of a normal run. It speaks what a client of syncd needs (RFC 6120, RFC 6121,
XEP-0030, XEP-0199, XEP-0065's proxy) for the accounts of one domain on this machine, keeps
everything in memory, and has no connection to other servers and no offline storage. What
only some servers can is switched on by `login.Abilities`: channel binding (XEP-0440), the
protection of the offer (XEP-0474), SASL2 (XEP-0388) with Bind 2 (XEP-0386) and tokens
(XEP-0484), stream management (XEP-0198). In reading order:

- `stream`: the server's side of one stream, from header to footer. Sans-IO.
- `login`: the server's side of SASL, and what SASL2 carries. Sans-IO.
- `resumption`: the server's side of stream management. Sans-IO.
- `presence`: who is online, who may see it; rosters and subscriptions. Sans-IO.
- `routing`: where each stanza goes. Sans-IO.
- `proxy65`: the SOCKS5 bytestreams proxy.
- `connection`: one client's connection. `server`: `open_server`, all of it together, with a
  CA and a certificate on the spot.
- `faults`: what the server can be told to do wrong, after what real servers do.
"""
