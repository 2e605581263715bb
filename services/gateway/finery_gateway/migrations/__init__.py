"""The tables of `finery_gateway.tables`, revision by revision; a test compares the two."""
