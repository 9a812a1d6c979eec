"""The queue between many callers and one model; it knows the library, and nothing else of the server.

Concurrent callers hand in tokenized cells; the dispatcher runs them together, in batches of similar length, on a thread
of its own. There is no timer: an idle model starts at once, and batches grow only because work piled up while the last
one ran. (As in text-embeddings-inference, the budget is in tokens, and callers that went away are dropped before they
cost compute.)

**Order.** Each batch is made when the one before it is done, from all callers that then wait, in the order of weighted
fair queueing (:mod:`serving.queue.fairness`): flows share the model equally, and so do the callers of one flow.

**Bound.** Let n callers share the model (the number of flows times the callers of each), in batches of B slots (padded
tokens), and let the cells of the last to come fit into one batch and take c slots. Then between the end of the batch
that runs when it comes and the end of the one that holds its cells, the others get at most (n - 1) c + B slots: what
equal sharing would have given them by then, and one batch. So beside one bulk caller, a caller of half a batch or less
runs in the first batch that begins after it came. Others that wait as well run in the same batch if their cells are of
similar length and fit.
"""

from serving.queue.dispatcher import MAX_RETRY, MIN_RETRY, Dispatcher
from serving.queue.observer import DispatchObserver

__all__ = ["MAX_RETRY", "MIN_RETRY", "DispatchObserver", "Dispatcher"]
