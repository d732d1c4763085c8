"""Records and record batches: what travels from producer to disk to consumer as opaque bytes.

Imports nothing of raftlog but ``raftlog.errors``; no asyncio, no ray, no clock. Start reading at ``batch``
(the header of Kafka's RecordBatch v2 and what a broker checks of it), then ``codec`` (records in and out of
a batch, for clients only: importing it loads aiokafka's compiled codec), ``control`` (batches that end a
transaction), ``frame`` (the log entry around a batch), ``types`` (what users see) and ``partitioner``.
"""
