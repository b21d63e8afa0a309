"""I/O address spaces: the protocol that mappers use, the table of mappings, and the allocator of I/O virtual addresses.

`space` has the protocol, `table` the mappings, `iova` the allocator, and `free_runs` the free addresses. `buckets` has
the sorted storage of `table` and `free_runs`. `type1_errors` has the message and hint for each error of a type1 map.
"""
