"""The system on one machine: object store, services and vLLM as processes under one supervisor."""
