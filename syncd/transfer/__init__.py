"""One file to one peer: stream initiation, the data thread, the two ends.

`si` is sans-IO and follows XEP-0095/0096; `schema` is the gate in front of it and of the
bytestreams. `pump` moves the bytes in a thread of its own, `sender` and `receiver` are the two
ends.
"""
