"""syncd delivers files over XMPP: drop one into a folder and it lies, whole, at the peers.

The map, in the order a file travels:

- `sync`: which file goes to whom, and when; knows no XML.
- `transfer`: one file to one peer; knows no folders' rules. `bytestreams`: ways for its
  bytes. `trust`: keys and sealing. `disk`: files below a folder.
- `xmpp`: an XMPP client stream without I/O, `link`: the same on trio; both know no files.
- `control`: the local window (ZeroMQ) that `syncctl` looks through.
- `cli`: `syncctl`. `demo`: a small XMPP server, for `syncctl demo` and the tests.
- `daemon`: owns every nursery, `wiring` joins the layers; `config` reads the one TOML file,
  with `settings`; `errors` is the whole exception tree.

Who may import whom: `errors` nobody; `xmpp`, `disk`, `trust` and `control` only `errors`,
`sync` also `disk`; `link`, `bytestreams` and `settings` only `xmpp` and `errors`; `config`
also `settings`, `transfer` also `disk`, `trust` and `bytestreams`; `cli` only `control`,
`config` and `errors` (its demo command also `demo`); `demo` the sans-IO parts of `xmpp`,
`bytestreams` and `transfer`; `wiring` and `daemon` everything else. Modules marked "Sans-IO"
import no trio, socket, ssl, time, random or os: clock, nonces and ids are arguments.
tests/test_layers.py proves both rules.
"""

__version__ = "0.1.0"
