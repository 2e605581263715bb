"""Commands by subject. Each translates options, calls the gateway or the local stack, and prints through `finery_cli.output`."""
