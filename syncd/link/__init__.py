"""The trio side of our XMPP stream; knows no files.

`resolve` finds the servers of a domain, `tls` knows whose certificate is good, says in words
why one is not, and ties the login to it, `keyring` remembers earlier logins, `connect` goes
from an account to a bound stream. `session` is one session's life, on however many connections,
`client` keeps having one (`retry` says when), `peers` and `contacts` know who is there and can
take files. What may come when, and what it means, `syncd.xmpp` decides, which does no I/O.
"""
