"""Ways for bytes from one JID to another; know nothing of files.

What is said over XMPP is in `s5b` and `ibb`, what is said to a streamhost in `socks5`; the
sockets are in `sockets`, and who is asked in which order in `outgoing`.
"""
