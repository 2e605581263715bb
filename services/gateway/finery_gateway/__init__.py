"""The only public door: OpenAI-compatible REST, native REST and the public gRPC services. Owns keys, projects and file metadata."""
