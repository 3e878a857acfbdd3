"""Files of a folder on disk, safe from names, links and crashes; knows no network.

`paths` takes or refuses names that come from the network (sans-IO), `beneath` reaches files by
directory descriptors and never through a link, `partial` keeps what has arrived of a file and
publishes it when it is whole, `blocks` proves how much of it is to go on from, `room` bounds
what all that is unfinished takes of the disk.
"""
