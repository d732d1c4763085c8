"""Ray Data: topics as exactly-once sources and sinks of pipelines, and streams of micro-batches.

What a Dataset reads is fixed when it is made: ``spans`` resolves offsets once, on the driver, and cuts them
into read tasks, also within a partition; so a task that is tried again, or a Dataset that is run twice, reads
the same. ``reading`` is what a read task does, ``source`` is the face that Ray Data sees.

What a Dataset writes becomes readable in one transaction of the driver's (``sink``). The tasks only make
values of it, encoded record batches in Ray's object store (``encoding``); which of several attempts of a task
counts is thereby Ray's affair, and nothing that a task does twice can be seen in a topic. The driver sends
the batches when all are there, together with the offsets of the group that they were made from.

``streaming`` joins both to an unbounded iterator.

May import client, record, config and errors; ray and pyarrow (the extra ``data``). Start reading at
``source``, then ``sink``.
"""
