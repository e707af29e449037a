"""First contact with a machine that none of this has run on: `make gpu` and `make mac`."""
