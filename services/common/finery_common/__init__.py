"""What every Finery service shares: specs, artifacts, jobs, errors, RPC, settings and telemetry. No service, no torch."""
