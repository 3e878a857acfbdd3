"""One file to one peer: stream initiation, bytestreams, the data thread, the two ends.

`si`, `socks5` and `s5b` are sans-IO and follow XEP-0095/0096 and XEP-0065; `schema` is the
gate in front of them. `bytestream` opens connections on trio (`addresses` knows our own),
`pump` moves the bytes in a thread of its own, `sender` and `receiver` are the two ends.
"""
