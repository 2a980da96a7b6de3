"""Which replica a request goes to.

Every adapter has a replica of its own while that one is healthy: rendezvous hashing orders the
replicas for an adapter (service/plan/rendezvous.py). Who is full is passed over: the next in that
order is the same one for every request, so an adapter that one replica cannot bear is borne by two.
What names no adapter goes to the less busy of two at random.
"""

from __future__ import annotations

import random

from ray.serve.request_router import PendingRequest, RequestRouter, RunningReplica

from service.plan.rendezvous import rendezvous


class AdapterRouter(RequestRouter):
    """Runs in the ingress. The multiplexed model id of a request is its adapter's."""

    async def choose_replicas(
        self,
        candidate_replicas: list[RunningReplica],
        pending_request: PendingRequest | None = None,
    ) -> list[list[RunningReplica]]:
        """Groups to try, one after the other; of a group the least busy one that has room."""
        if pending_request is None:
            return [candidate_replicas]
        pending_request.routing_context.should_backoff = True  # once all of them are full
        model = pending_request.metadata.multiplexed_model_id
        if not model:
            return [random.sample(candidate_replicas, min(2, len(candidate_replicas)))]
        ranked = rendezvous(model, candidate_replicas, lambda replica: replica.replica_id.unique_id)
        return [[replica] for replica in ranked]
