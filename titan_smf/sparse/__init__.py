"""What the memory slots are used for, and the update of those that a step selects.

In: the slots that lookups read, as each rank reports them for the rows it owns. Out: counts of
accesses, document frequencies and their file, the slots to update (ranking), updated rows. Pure
torch: imports `model` and below, and no torchtitan.
"""
