"""The merge against PEFT and transformers, on a tiny random model and on SmolLM2."""
