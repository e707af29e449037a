"""Imported last by the server of forks (forked.py): what is loaded by then stays, and is left out of its children's
garbage collections, each of which would copy every page of it."""

import gc

gc.collect()
gc.freeze()
