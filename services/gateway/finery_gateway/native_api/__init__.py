"""Finery's own REST API, `/api/v1`: datasets, conversions, deployments and what they stand on. One module a resource."""
