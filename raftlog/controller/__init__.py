"""What decides where replicas live, and has brokers come and go.

Decisions are pure functions: ``placement`` says on which brokers the replicas of a new topic go, ``balance``
which of those that there are should be elsewhere, and ``reconcile`` what to do next. ``controller`` is the
loop around them, and ``sampling`` what it last saw, as metrics. May import state, net, client and errors.
Start reading at ``reconcile``.
"""
