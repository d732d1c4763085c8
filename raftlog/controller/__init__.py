"""What decides where replicas live.

Decisions are pure functions of the metadata: ``placement`` says on which brokers the replicas of a new topic
go, ``replacing`` what takes the place of a lost broker, and has that done. May import state, net, client and
errors. Start reading at ``placement``.
"""
