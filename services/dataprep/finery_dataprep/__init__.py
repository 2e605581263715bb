"""The dataprep service: uploaded rows become checked, templated and tokenized shards."""
