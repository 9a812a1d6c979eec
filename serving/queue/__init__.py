"""One queue between many callers and the one model.

Concurrent callers hand in tokenized cells; the dispatcher runs them together, in batches of similar length, on a thread
of its own. There is no timer: an idle model starts at once, and batches grow only because work piled up while the last
one ran. (The shape follows text-embeddings-inference: a budget in tokens, and callers that went away are dropped before
they cost compute.)

**Order.** Each batch is made when the one before it is done, from all callers that then wait, in the order of weighted
fair queueing (:mod:`serving.queue.fairness`): flows share the model equally, and so do the callers of one flow.

**Bound.** Let n callers share the model (the flows, times the callers of one flow), each in batches of B slots, and let
one come whose cells fit into one batch, of c slots with their padding. Then from the end of the batch that runs when it
comes until its cells have run, the others get at most (n - 1) c + B slots: what equal sharing would have given them by
then, and one batch. Beside one bulk caller, a caller of half a batch or less so runs in the first batch that is begun
after it came. Others that wait as well run in the same batch where their cells are of similar length and fit.
"""

from serving.queue.dispatcher import MAX_QUEUED_TOKENS, MAX_RETRY, MIN_RETRY, Dispatcher
from serving.queue.observer import DispatchObserver, NoObserver
from serving.queue.runner import MAX_BATCH_SECONDS

__all__ = [
    "MAX_BATCH_SECONDS",
    "MAX_QUEUED_TOKENS",
    "MAX_RETRY",
    "MIN_RETRY",
    "DispatchObserver",
    "Dispatcher",
    "NoObserver",
]
