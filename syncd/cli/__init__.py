"""`syncctl`: looks at the daemon, waits for it, and tries everything out.

`main` reads the command line and turns errors into exit codes (`exits`), `output` shows a
status to people, `demo` lets two daemons exchange a file. Nothing here imports trio, except
the demo: a status is asked for often, and must be there at once.

Data goes to stdout and messages to stderr; what programs read is JSON and exit codes, what
people read may change. Every text that somebody else chose is shown through
`syncd.control.escape.printable`.
"""
