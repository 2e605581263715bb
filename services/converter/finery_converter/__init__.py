"""The converter: adapters become models that other engines read."""
