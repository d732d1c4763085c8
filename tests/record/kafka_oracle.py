"""kafka-python's own reading of the formats, to check ours against.

Imported here once because kafka-python's import uses what Python 3.11 deprecates, and warnings are errors
in tests.
"""

import warnings

with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)
    from kafka.partitioner.default import murmur2 as their_murmur2
    from kafka.record.default_records import DefaultRecordBatch as TheirBatch
    from kafka.record.default_records import DefaultRecordBatchBuilder as TheirBuilder

__all__ = ["TheirBatch", "TheirBuilder", "their_murmur2"]
