"""The part of OpenAI's API that fine-tuning and its results need, so that the official client works as it is. One module a resource."""
