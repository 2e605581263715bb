"""Serving: keeps one vLLM running and swaps LoRA adapters in it while requests are in flight.

`vllm_process` starts, watches and restarts vLLM, `vllm_client` talks to it, `middleware` lives inside it. `residency` owns which
versions it holds, `registry` which replicas of which base models there are, `aliases` the desired state in the database, `deployments` what
may enter it, `rollout` how a version takes an alias over, `routes` where a request goes; `reconcile` brings the replica to what the
database wants and `agent` wires them. This process is not in the path of tokens and
imports neither torch nor vLLM.
"""
