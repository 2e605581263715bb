"""Long-running work as every service keeps it: states, events without gaps, leases that refuse zombies.

Owns the tables `jobs` and `job_events` in the service's database. Leaves to the service what a job does, who works on it and when; a
service maps these values to its protos in `server.py`.

    db = await Database.open(url, schema="trainer")
    await migrate(db)
    store = JobStore(db, kind="training", id_prefix="ftjob-")
    job = await store.create("my-project", request_id="7f…", spec={...}, metadata={"team": "a"})

    lease = await store.acquire(job.id, holder="worker-1", ttl_s=30)
    await store.transition(job.id, JobState.RUNNING, message="Training starts.", epoch=lease.epoch)
    await store.append_event(job.id, type="step", data={"loss": 1.2}, progress={"step": 1}, epoch=lease.epoch)
    job = await store.renew(lease, ttl_s=30)      # job.wanted says whether to pause or cancel
    await store.transition(job.id, JobState.SUCCEEDED, result={"adapter": "…"}, epoch=lease.epoch)

    async for event in store.watch(job.id, after_sequence=0): ...
"""

from finery_common.jobs.model import TRANSITIONS, EventLevel, Job, JobEvent, JobPage, JobState, Lease, Wanted
from finery_common.jobs.store import JobStore, migrate

__all__ = ["TRANSITIONS", "EventLevel", "Job", "JobEvent", "JobPage", "JobState", "JobStore", "Lease", "Wanted", "migrate"]
