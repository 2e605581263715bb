"""gRPC as every service speaks it.

`server` runs a service: authentication, error mapping, metrics, health, reflection, graceful drain. `channel` makes the
client's side: tokens, deadlines, errors back into the tree. `tokens` signs and reads the short-lived tokens, `status` maps
errors, `messages` converts what services share.
"""
