"""One file to one peer: stream initiation, bytestreams, the data thread, partial files.

`si`, `socks5` and `s5b` are sans-IO and follow XEP-0095/0096 and XEP-0065. `bytestream`
opens connections on trio, `pump` moves the bytes in a thread of its own, `partial` keeps
what has arrived and publishes it, `sender` and `receiver` are the two ends.
"""
