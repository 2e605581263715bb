"""The folder on vLLM's PYTHONPATH: `finery_vllm_middleware`, and nothing else of Finery's."""
