"""What joins the layers: each is handed here what it needs of the others, as callables.

`links` joins stream, folders and transfers, `keys` the journal with trust, `throttles` the
limits with the data threads, and `status` asks all of them.
"""
