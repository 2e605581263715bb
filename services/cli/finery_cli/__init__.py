"""The `finery` command: runs the whole system on this machine, and is a client of any gateway."""
