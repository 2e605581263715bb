"""The tables of `finery_common.jobs.tables`, revision by revision; a test compares the two."""
