"""Which file goes to whom, and when; knows no XML.

`settle` and `plan` are sans-IO: when a file is whole, and what starts next. `folder` watches
one folder (watchdog's events as hints, scans by `walk` as the truth), `journal` holds what
must survive a crash, `engine` brings what is settled to whom it is owed.
"""
