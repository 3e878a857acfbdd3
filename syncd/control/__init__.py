"""The local window: what `syncctl` asks and what the daemon answers, over a ZeroMQ socket.

`messages` are the questions and answers as typed JSON, `escape` makes text of others fit
for a terminal or a log, and `summary` turns a state into the one line that answers "is
everything delivered?". These three are sans-IO. `lock` says who serves a socket, `server`
is the daemon's end on trio, `client` the other end, without trio, so that it starts fast.

What ZeroMQ does not give is made here. A bind steals the path of a living server and
replaces any file in silence, and a connect succeeds with nobody there. So the server takes
a lock beside the socket first, replaces nothing but a socket of its own, and the client
looks at the lock before it asks: "not running", "runs but does not answer" and "not
permitted" are three different answers. Who may ask is decided three times: by the 0700
directory, by the socket's mode, and by the kernel's word for the uid of every connection.

The server's file descriptor is edge-triggered, so one task alone touches the socket: it
takes what is there, hands each question to a task of its own, sends what these have
answered, and sleeps. Every question is bounded in size, in time, and in how many of its
kind run at once; one that is slow delays no other.
"""
