"""Metrics of what every service uses of this package; the artifact store's and gRPC's are in their packages."""

from prometheus_client import Counter

DATABASE_FAILURES = Counter(
    "finery_database_failures_total", "Transactions that failed since the database was gone, locked, damaged, full, or lacked a privilege."
)
