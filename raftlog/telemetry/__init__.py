"""What a cluster says of itself while it runs: counters, the names of its metrics, and how log lines look.

Nothing in here knows Ray, a broker or a clock, and nothing of raftlog is imported: all others may use it.
``counters.py`` has what hot paths add to, ``catalogue.py`` every metric with its kind and tags, ``logs.py``
the fields of log lines and their formats. ``raftlog.broker.sampling`` and ``raftlog.controller.sampling``
turn counters and state into samples every few seconds; ``raftlog.actors.metrics`` gives these to Ray.
"""
