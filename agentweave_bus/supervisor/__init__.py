"""Worker processes and who owns them: started, ready when they say so, watched, restarted, drained.

What to do about a worker is decided by pure functions (:mod:`.rules`); processes, pipes and sockets are at
the edge.
"""
