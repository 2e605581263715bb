"""Turns a dataset and a base model into an adapter. `server` owns jobs, `worker` runs one attempt, `engine` does the numbers."""
