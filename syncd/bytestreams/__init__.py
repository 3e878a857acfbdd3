"""Ways for bytes from one JID to another; know nothing of files.

What is said over XMPP is in `s5b` and `ibb`, what is said to a streamhost in `socks5`; the
sockets are in `sockets`, and how a stream to somebody comes about in `outgoing`. Which proxies
there are is found out by `discovery` and remembered in `proxies`.
"""
