"""What decides where replicas live.

Decisions are pure functions of the metadata: ``placement`` says on which brokers the replicas of a new topic
go. May import state, net, client and errors; a broker may import ``placement`` from here, and nothing else.
Start reading there.
"""
