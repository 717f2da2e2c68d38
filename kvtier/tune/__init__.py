"""`kvtier tune`: which values of the few keys that replay can judge find most, and do they still on requests they were not chosen on?

`space`: the keys and what they may be. `rooms`: how many pages the tiers hold. `judge`: what a configuration finds. `search`: the optimiser
and its study file. `evidence`: what is said and written in the end. Without torch, but for capacities that a configuration implies.
"""
