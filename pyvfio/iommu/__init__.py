"""I/O address spaces: the protocol that mappers use, its table of mappings, and the allocator of I/O virtual addresses.

`space` has the protocol, `table` the mappings, `iova` the allocator, and `type1_errors` the words for each refusal.
"""
